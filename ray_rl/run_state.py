"""The run folder: the resolved configuration, checkpoints to go on from, and one user at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_rl.checkpoints import Checkpoints, NewCheckpoint, RunState
from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError, RunError, writing
from ray_rl.inventory import Damaged, write_atomically
from ray_rl.object_store import Place

__all__ = ["NewCheckpoint", "RunFolder", "RunState", "Start"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run goes on."""

    state: RunState
    """Of the newest whole checkpoint; of a new run where there is no checkpoint yet."""
    notes: tuple[str, ...]
    """For the user, one line each: newer checkpoints that are damaged, and how; and what could not be checked."""


class RunFolder:
    """A run on disk.

    ``config.yaml``, ``metrics.jsonl``, ``groups.jsonl``, ``ledger.jsonl``, ``checkpoints/`` (`ray_rl.checkpoints`), ``logs/``
    (`ray_rl.run_logs`) and ``final/``. What writes raises NotWritten where the system refuses.
    """

    def __init__(self, path: Path) -> None:
        """A folder that exists; see `create` and `open`."""
        self.path = path
        self._checkpoints = Checkpoints(path / "checkpoints")

    @classmethod
    def create(cls, path: Path | None, config: RunConfig) -> RunFolder:
        """Make the folder of a new run and write its resolved configuration.

        Args:
            path: where; None: ``runs/<name>-<time>`` in the current folder.
            config: of the run.

        Raises:
            ConfigError: the folder holds something already.
            NotWritten: the system refused.
        """
        if path is None:
            path = _new_folder(Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        elif path.exists() and (not path.is_dir() or any(map(_is_in_the_way, path.iterdir()))):
            mend = f"go on with it: train --resume {path}; or name" if cls.is_run(path) else "name"
            raise ConfigError(f"--run-dir: {path} is not empty; {mend} a new folder")
        with writing(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
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
        """Where `finish` leaves the policy, in Hugging Face format."""
        return self.path / "final"

    @property
    def where(self) -> str:
        """What a user calls it by."""
        return str(self.path)

    def finish(self, step: int) -> None:
        """The run has ended at a step: leave its policy where users look for it, in ``final/``."""
        with writing(self.final):
            shutil.copytree(self._checkpoints.path(step) / "policy", self.final, dirs_exist_ok=True)

    @property
    def ledger(self) -> Path:
        """Where `ray_rl.ledger` keeps the book of the run."""
        return self.path / "ledger.jsonl"

    @property
    def logs(self) -> Path:
        """Where `ray_rl.run_logs` keeps what each component says."""
        return self.path / "logs"

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration: a resumed run's may differ from what it was started with."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        with writing(self.path / "config.yaml"):
            write_atomically(self.path / "config.yaml", text)

    def config_data(self) -> dict[str, Any]:
        """The resolved configuration that the run was last started with, as plain data for `resolve_config`.

        Raises:
            ConfigError: it cannot be read, or is not YAML or no mapping any more.
        """
        path = self.path / "config.yaml"
        try:
            data = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: holds no options any more; bring it back from a copy, or begin a new run")
        return data

    def checkpoint(self, step: int) -> Place:
        """Where the checkpoint of a step lies or would lie."""
        return self._checkpoints.path(step)

    def steps(self) -> list[int]:
        """Steps with a checkpoint that was completed, ascending; `find_start` tells which is still whole."""
        return self._checkpoints.steps()

    def find_start(self) -> Start:
        """Where the run goes on: at the newest checkpoint whose files are what was written.

        It reads that checkpoint wholly. `prune` then removes the damaged ones, which are newer.

        Raises:
            RunError: there are checkpoints, but none is whole; or the system does not let a newer one be read, which
                is no reason to give it up.
        """
        state, notes = self._checkpoints.newest_whole(instead="going on from")
        if state is None and notes:
            mend = "bring one back from a copy, or begin a new run"
            raise RunError(f"{self.where}: no checkpoint is whole: {'; '.join(notes)}; {mend}")
        return Start(state=state or RunState.new(int(self.config_data().get("seed", 0))), notes=tuple(notes))

    def latest_state(self) -> RunState:
        """The state that `find_start` finds."""
        return self.find_start().state

    def state(self, step: int) -> RunState:
        """The state that the checkpoint of a step holds; its other files are not looked at.

        Raises:
            ConfigError: there is no complete checkpoint of that step, or its manifest is damaged.
        """
        self._require(step)
        try:
            return self._checkpoints.read(step)[0]
        except Damaged as error:
            raise ConfigError(f"{self.checkpoint(step)}: {error}") from error

    def policy(self, step: int | None = None) -> Path:
        """The policy of a step, or the newest one that is whole, in Hugging Face format. Warns of newer ones.

        Raises:
            ConfigError: there is no such checkpoint, or the policy's files are not what was written.
        """
        if step is not None:
            self._require(step)
            try:
                self._checkpoints.check(step, "policy/")
            except Damaged as error:
                raise ConfigError(f"{self.checkpoint(step)}: {error}; use another step") from error
            return self._at_hand(self.checkpoint(step) / "policy")
        state, notes = self._checkpoints.newest_whole("policy/", instead="using")
        if state is None:
            raise ConfigError(f"{self.where}: {'; '.join(notes) or 'the run has no checkpoint yet'}")
        for note in notes:
            logger.warning("%s: %s", self.where, note)
        return self._at_hand(self.checkpoint(state.step) / "policy")

    def new_checkpoint(self, state: RunState) -> AbstractContextManager[NewCheckpoint]:
        """`Checkpoints.new`: a folder that becomes the checkpoint of the state's step, or is not there."""
        return self._checkpoints.new(state, self.path / "config.yaml")

    def prune(self, keep: int, current: int) -> list[str]:
        """`Checkpoints.prune`: keep the newest `keep` up to a step, delete all others; lines on what could not be."""
        return self._checkpoints.prune(keep, current)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go when the process ends, however it ends.

        Raises:
            ConfigError: another process holds it.
        """
        path = self.path / ".lock"
        with writing(path):
            lock = path.open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ConfigError(
                    f"{self.path}: {lock.read().strip()} is using this run; wait for it or end it"
                ) from error
            with writing(path):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                lock.flush()
            yield

    def remove_unused(self) -> None:
        """Delete the folder if its run never got as far as a metric: the same command can then be given again.

        The logs of actors are kept, for they may tell why; a new run may begin in a folder that holds nothing else.
        """
        if (self.path / "metrics.jsonl").exists() or self.steps():
            return
        if not _actor_logs(self.logs):
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and entry != self.logs:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != self.logs:
                with suppress(OSError):
                    entry.unlink()

    def _at_hand(self, place: Place) -> Path:
        """A folder of a checkpoint, on this machine."""
        assert isinstance(place, Path)
        return place

    def _require(self, step: int) -> None:
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(f"{self.where}: no complete checkpoint of step {step}; there are: {known}")


def _is_in_the_way(entry: Path) -> bool:
    """Whether something in a folder keeps a run from beginning there; what one leaves that died in its beginning does not."""
    if entry.name == "checkpoints":
        return not entry.is_dir() or any(entry.iterdir())
    return entry.name != "logs" and not entry.name.startswith(".config.yaml.")


def _actor_logs(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.log") if path.name != "driver.log"]


def _new_folder(path: Path) -> Path:
    """Make a folder that was not there; runs that start in the same second get a number."""
    with writing(path.parent):
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
