"""`ray-rl submit`: what a job is to do, checked here before anything is sent, and then followed to its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ray_rl.config.load import PATHS, load_config, recipe_names
from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError, RunError, writing
from ray_rl.job_log import JobLog
from ray_rl.job_server import JobEnd, JobServer
from ray_rl.object_store import is_url
from ray_rl.store_connection import check_url
from ray_rl.working_folder import WorkingFolder

COMMANDS = ("bench", "doctor", "evaluate", "export", "scale", "status")
"""What a job can do besides training."""
_PROGRAM = ("python", "-m", "ray_rl")
_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
"""A run that is stopped ends its step and saves within so many seconds; Ray would give it 3."""
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A command for a job, in a copy of the working folder. Whoever makes one raises ConfigError for what cannot work."""

    words: tuple[str, ...]
    """Of the command."""
    folder: WorkingFolder
    submission_id: str | None = None
    """None: Ray makes one."""

    @classmethod
    def of(
        cls, words: Sequence[str], *, run_dir: str | None, brings_report: bool, submission_id: str | None
    ) -> Submission:
        """What a user asks for: a recipe and overrides, or one of COMMANDS and its arguments; from the current folder."""
        if words and words[0] in COMMANDS:
            if run_dir:
                raise ConfigError(f"--run-dir: {words[0]} begins no run; leave it out")
            call = command(words, brings_report=brings_report)
            folder = WorkingFolder.read(Path.cwd())
        else:
            if not words:
                raise ConfigError("submit: name a recipe (ray-rl recipes lists them), or: submit ... -- bench CASE")
            if brings_report:
                raise ConfigError("--json: brings back the report of `bench`; a training leaves its own in --run-dir")
            recipe, *overrides = words
            check_run_dir(run_dir)
            config = load_config(recipe, overrides, elsewhere=True)
            folder = WorkingFolder.read(Path.cwd())
            if recipe not in recipe_names():
                recipe = folder.relative(recipe, option="recipe")
            check_paths(config, folder)
            call = ["train", recipe, *overrides, "--run-dir", str(run_dir), "--continue"]
        folder.check()
        return cls(words=(*_PROGRAM, *call), folder=folder, submission_id=submission_id)

    @property
    def entrypoint(self) -> str:
        """For a shell, which the command replaces: `ray job stop` would wait for a shell that stays as a zombie."""
        return shlex.join(("exec", *self.words))

    def line(self, address: str) -> str:
        """The same with Ray's own command, for a shell in the working folder."""
        name = ["--submission-id", self.submission_id] if self.submission_id else []
        environment = ["--runtime-env-json", json.dumps({"env_vars": _ENVIRONMENT})]
        call = ["ray", "job", "submit", "--address", address, *name, "--working-dir", ".", *environment, "--"]
        return f"{shlex.join(call)} {self.entrypoint}"


def check_run_dir(run_dir: str | None) -> None:
    """Raise ConfigError for a place of which nothing would be left, or that holds a secret."""
    if run_dir and is_url(run_dir):
        check_url(run_dir)  # whoever may look at jobs reads their commands
    elif not run_dir or not run_dir.startswith("/"):
        fault = f"{run_dir} would lie in the job's working folder, which is deleted" if run_dir else "is missing"
        raise ConfigError(
            f"--run-dir: {fault}; name a folder, from the root, on storage that all nodes of the cluster share, or a URL"
        )


def check_paths(config: RunConfig, folder: WorkingFolder) -> None:
    """Raise ConfigError for a file of the working folder that would not arrive; absolute paths are the cluster's own."""
    for section, key in PATHS:
        value = getattr(getattr(config, section), key, None)
        if not isinstance(value, str):
            continue
        path = value.rpartition(":")[0] if key == "function" else value
        if path.startswith(("/", "~")):
            continue
        if (folder.path / path).exists():
            folder.relative(path, option=f"{section}.{key}")
        elif key == "function":
            raise ConfigError(f"{section}.{key}: there is no file {path} in the working folder {folder.path}")


def command(words: Sequence[str], *, brings_report: bool) -> list[str]:
    """The arguments of a job that is no training, such as `bench overlap --quick`.

    Raises:
        ConfigError: a report would not come back, or an export would be lost.
    """
    is_bench = words[0] == "bench"
    if brings_report and not is_bench:
        raise ConfigError(
            f"--json: brings back the report of `bench`, and {words[0]} prints what it finds; leave it out"
        )
    if is_bench and any(word.partition("=")[0] == "--json" for word in words):
        raise ConfigError("bench --json: the file would stay on the cluster; put --json FILE before the --")
    if words[0] == "export" and (lost := _lost_export(words)):
        raise ConfigError(
            f"export: {lost} would lie in the job's working folder, which is deleted; name a folder, from the root, on storage "
            "of the cluster"
        )
    return [*words, *(["--json", "-"] if brings_report else [])]


def _lost_export(words: Sequence[str]) -> str | None:
    """The folder that an export goes to, if nothing would be left of it."""
    named = [word for before, word in pairwise(words) if not word.startswith("--") and before != "--checkpoint"]
    return named[1] if len(named) > 1 and not named[1].startswith("/") else None


def submit(
    submission: Submission, *, address: str, follow: bool, json_file: Path | None, say: Callable[[str], None]
) -> int:
    """Submit a job and see it to its end.

    Args:
        submission: what it does.
        address: of the job server.
        follow: until its end; otherwise until it is submitted.
        json_file: where the report of `bench` goes; None: nowhere.
        say: told lines for the user, those that the job prints among them.

    Returns:
        The exit code: 0, 1 or 2, as the job's; 130 after Ctrl-C, which leaves the job alone.

    Raises:
        ConfigError: nothing was submitted.
        RunError: nobody knows how the job ended, or it brought no report.
    """
    server = JobServer.connect(address)
    say(f"working folder  {submission.folder}")
    name = server.submit(
        submission.entrypoint,
        folder=submission.folder.path,
        environment=_ENVIRONMENT,
        submission_id=submission.submission_id,
    )
    say(f"submission id   {name}")
    say(f"the same        {submission.line(server.address)}")
    if not follow:
        _say_what_next(name, server, say)
        return 0
    log = JobLog(say)
    try:
        end = server.follow(name, log)
    except KeyboardInterrupt:
        say(f"job {name} goes on")
        _say_what_next(name, server, say)
        return _INTERRUPTED
    say(f"job {name} {end.status}{f': {end.message}' if end.message else ''}")
    if json_file:
        _write_report(log.report, json_file, end)
    return exit_code(end)


def _say_what_next(name: str, server: JobServer, say: Callable[[str], None]) -> None:
    say(f"to follow it    ray job logs --address {server.address} --follow {name}")
    say(f"to stop it      ray job stop --address {server.address} {name}")


def exit_code(end: JobEnd) -> int:
    """Of this process, after a job's: 2 for what the user can mend, 1 for other failures and for a job that was stopped."""
    if end.status == "SUCCEEDED":
        return 0
    return 2 if end.exit_code == 2 else 1


def _write_report(report: str, path: Path, end: JobEnd) -> None:
    try:
        json.loads(report)
    except ValueError as error:
        if end.status != "SUCCEEDED":  # which has been said
            return
        raise RunError("--json: the job ended well and printed no report that can be read; see its log") from error
    with writing(path):
        path.write_text(report + "\n")
