"""The run folder: the resolved configuration, checkpoints that are whole or not there, and one user at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError

_MANIFEST = "manifest.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What, besides the learner's own state, a resumed run needs."""

    step: int
    """Training steps done."""
    policy_version: int
    """Of the policy after that step."""
    position: int
    """Of the prompt stream: prompts handed out."""
    pending_positions: tuple[int, ...]
    """Handed out but not trained on; they are sampled again first."""
    seed: int
    """Of the run, from which prompt order, sampling and minibatch order follow together with step and position."""

    @classmethod
    def new(cls, seed: int) -> RunState:
        """The state of a run that has done nothing."""
        return cls(step=0, policy_version=0, position=0, pending_positions=(), seed=seed)


class RunFolder:
    """A run on disk.

    ``config.yaml``, ``metrics.jsonl``, ``groups.jsonl``, ``checkpoints/step_N/{manifest.json,learner,policy}`` and
    ``final/``.
    """

    def __init__(self, path: Path) -> None:
        """A folder that exists; see `create` and `open`."""
        self.path = path

    @classmethod
    def create(cls, path: Path | None, config: RunConfig) -> RunFolder:
        """Make the folder of a new run and write its resolved configuration.

        Args:
            path: where; None: ``runs/<name>-<time>`` in the current folder.
            config: of the run.

        Raises:
            ConfigError: the folder holds something already.
        """
        if path is None:
            path = _new_folder(Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            mend = f"go on with it: train --resume {path}; or name" if cls.is_run(path) else "name"
            raise ConfigError(f"--run-dir: {path} is not empty; {mend} a new folder")
        (path / "checkpoints").mkdir(parents=True)
        folder = cls(path.resolve())
        folder.write_config(config)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that exists.

        Raises:
            ConfigError: it is none.
        """
        if not cls.is_run(path):
            raise ConfigError(f"{path}: not a run folder (there is no config.yaml in it)")
        return cls(path.resolve())

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a path is a run's folder."""
        return (path / "config.yaml").is_file()

    @property
    def final(self) -> Path:
        """Where the trained policy lies when the run has ended, in Hugging Face format."""
        return self.path / "final"

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration: a resumed run's may differ from what it was started with."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        _write_atomically(self.path / "config.yaml", text)

    def config_data(self) -> dict[str, Any]:
        """The resolved configuration that the run was last started with, as plain data for `resolve_config`.

        Raises:
            ConfigError: it is not YAML any more.
        """
        try:
            return yaml.safe_load((self.path / "config.yaml").read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.path / 'config.yaml'}: not valid YAML: {' '.join(str(error).split())}") from error

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies or would lie."""
        return self.path / "checkpoints" / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        found = (self.path / "checkpoints").glob(f"step_*/{_MANIFEST}")
        names = [manifest.parent.name.removeprefix("step_") for manifest in found]
        return sorted(int(name) for name in names if name.isdigit())

    def latest_state(self) -> RunState:
        """The state of the newest complete checkpoint; of a new run when there is none."""
        steps = self.steps()
        return self.state(steps[-1]) if steps else RunState.new(int(self.config_data().get("seed", 0)))

    def state(self, step: int) -> RunState:
        """The state that the checkpoint of a step holds.

        Raises:
            ConfigError: there is no complete checkpoint of that step.
        """
        self._require(step)
        manifest = json.loads((self.checkpoint(step) / _MANIFEST).read_text())
        manifest.pop("config_sha256")
        return RunState(**{**manifest, "pending_positions": tuple(manifest["pending_positions"])})

    def policy(self, step: int | None = None) -> Path:
        """The policy of a step, or the newest one, in Hugging Face format.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if step is None:
            steps = self.steps()
            if not steps:
                raise ConfigError(f"{self.path}: the run has no checkpoint yet")
            step = steps[-1]
        self._require(step)
        return self.checkpoint(step) / "policy"

    @contextmanager
    def new_checkpoint(self, state: RunState) -> Iterator[Path]:
        """A folder to write a checkpoint into; it becomes ``step_N`` when the block ends without an error.

        A process that dies amid leaves a folder that no one takes for a checkpoint.
        """
        target = self.checkpoint(state.step)
        partial = target.with_name(target.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        digest = hashlib.sha256((self.path / "config.yaml").read_bytes()).hexdigest()
        manifest = {**asdict(state), "config_sha256": digest}
        _write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(target.parent)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` (at least 1) checkpoints, and what interrupted ones left."""
        for step in self.steps()[:-keep]:
            shutil.rmtree(self.checkpoint(step))
        for partial in (self.path / "checkpoints").glob(f"*{_PARTIAL}"):
            shutil.rmtree(partial)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go when the process ends, however it ends.

        Raises:
            ConfigError: another process holds it.
        """
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ConfigError(
                    f"{self.path}: {lock.read().strip()} is using this run; wait for it or end it"
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def remove_unused(self) -> None:
        """Delete the folder if its run never got as far as a metric: the same command can then be given again."""
        if not (self.path / "metrics.jsonl").exists() and not self.steps():
            shutil.rmtree(self.path)

    def _require(self, step: int) -> None:
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(f"{self.path}: no complete checkpoint of step {step}; there are: {known}")


def _new_folder(path: Path) -> Path:
    """Make a folder that was not there; runs that start in the same second get a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate


def _write_atomically(path: Path, text: str) -> None:
    """All of the text or none of it, also when the machine stops amid."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
