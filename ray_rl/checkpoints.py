"""The checkpoints of a run: folders that are whole or not there, and known to be whole before they are used."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray_rl.errors import RunError, writing
from ray_rl.inventory import (
    MANIFEST,
    Damaged,
    FileEntry,
    damage,
    read_manifest,
    sync_folder,
    take,
    write_manifest,
)
from ray_rl.object_store import Place

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
    """Handed out and, at the end of that step, neither trained on nor dropped; they are sampled again first."""
    seed: int
    """Of the run, from which prompt order, sampling and minibatch order follow together with step and position."""
    trained: int = 0
    """Prompts trained on (`ray_rl.ledger`)."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> prompts dropped for it."""

    @classmethod
    def new(cls, seed: int) -> RunState:
        """The state of a run that has done nothing."""
        return cls(step=0, policy_version=0, position=0, pending_positions=(), seed=seed)

    @classmethod
    def from_manifest(cls, data: Mapping[str, Any]) -> RunState:
        """What `asdict` made of a state; older ones have no totals, and other keys don't matter.

        Raises:
            Damaged: it is no state.
        """
        try:
            return cls(
                step=int(data["step"]),
                policy_version=int(data["policy_version"]),
                position=int(data["position"]),
                pending_positions=tuple(map(int, data["pending_positions"])),
                seed=int(data["seed"]),
                trained=int(data.get("trained", 0)),
                dropped={str(reason): int(count) for reason, count in data.get("dropped", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"{MANIFEST} holds no state of a run") from error


class NewCheckpoint:
    """A checkpoint in the making (`Checkpoints.new`)."""

    def __init__(self, path: Path) -> None:
        """`path`: the folder to write into."""
        self.path = path
        self._files: dict[str, FileEntry] | None = None

    @property
    def place(self) -> Place:
        """Where the learner writes: the same for all its ranks, whatever node they are on."""
        return self.path

    def add(self, name: str, files: Mapping[str, FileEntry]) -> None:
        """Note what was written below `place` elsewhere; here nothing is: `seal` finds all files.

        Args:
            name: of the folder in `place`.
            files: in it.
        """

    def seal(self) -> dict[str, FileEntry]:
        """Bring what was written to the disk and take its digests, once; nothing is written afterwards.

        It takes as long as reading all of it: work for a thread where a loop is running.

        Raises:
            NotWritten: the system refused.
        """
        if self._files is None:
            with writing(self.path):
                self._files = take(self.path, sync=True)
        return self._files


class Checkpoints:
    """``step_N/{manifest.json,learner,policy}`` in one folder."""

    def __init__(self, path: Path) -> None:
        """`path`: the folder; while it is missing there are no checkpoints."""
        self._path = path

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies or would lie."""
        return self._path / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint that was completed, ascending. Whether it is still whole, `check` tells."""
        return [step for step in self._begun() if (self.path(step) / MANIFEST).exists()]

    def read(self, step: int) -> tuple[RunState, dict[str, FileEntry] | None]:
        """State and files of a checkpoint as its manifest has them; no files where an older version wrote it.

        Raises:
            Damaged: the manifest is missing, or not what was written.
        """
        data, files = self._manifest(step)
        state = RunState.from_manifest(data)
        if state.step != step:
            raise Damaged(f"{MANIFEST} is that of step {state.step}")
        return state, files

    def check(self, step: int, under: str = "") -> tuple[RunState, list[str]]:
        """Compare a checkpoint's files with what was written, reading them all.

        Args:
            step: of the checkpoint.
            under: only files whose path begins so.

        Returns:
            The state, and a line on what could not be checked, if anything.

        Raises:
            Damaged: a file is not what was written.
            Unreadable: the system does not say whether one is.
        """
        state, files = self.read(step)
        if files is None:
            return state, [f"step {step}: saved by an older version without digests; its files could not be checked"]
        fault = self._damage(step, {name: file for name, file in files.items() if name.startswith(under)})
        if fault is not None:
            raise Damaged(fault)
        return state, []

    def newest_whole(self, under: str = "", *, instead: str) -> tuple[RunState | None, list[str]]:
        """The newest checkpoint that passes `check`, and one line for each newer one and for what could not be checked.

        Args:
            under: as for `check`.
            instead: what happens with the one found, for the lines, before "step 4".

        Returns:
            Its state, None where there is none, and the lines.

        Raises:
            Unreadable: one that is newer than all that are whole may be whole, too.
        """
        skipped: list[str] = []
        for step in reversed(self._begun()):
            try:
                state, unchecked = self.check(step, under)
            except Damaged as error:
                skipped.append(f"step {step}: {error}")
                continue
            return state, [*(f"{line}; {instead} step {step}" for line in skipped), *unchecked]
        return None, skipped

    @contextmanager
    def new(self, state: RunState, config: Path) -> Iterator[NewCheckpoint]:
        """A folder to write a checkpoint into; it becomes ``step_N`` when the block ends without an error.

        What the block did not `seal` is sealed at its end. With an error nothing is left of it; a process that dies amid
        leaves a folder that no one takes for a checkpoint.

        Args:
            state: of the run.
            config: the run's configuration, whose digest is noted.

        Raises:
            NotWritten: the system refused, here or in the block.
        """
        target = self.path(state.step)
        new = NewCheckpoint(target.with_name(target.name + _PARTIAL))
        try:
            shutil.rmtree(new.path, ignore_errors=True)
            new.path.mkdir(parents=True)
            yield new
            files = new.seal()
            write_manifest(new.path, manifest_data(state, config), files)
            _put_in_place(new.path, target)
        except BaseException as error:
            shutil.rmtree(new.path, ignore_errors=True)
            if isinstance(
                error, RunError
            ):  # a deadline's is a TimeoutError and so an OSError, but it says what was late
                raise
            with writing(target):
                raise

    def prune(self, keep: int, current: int) -> list[str]:
        """Delete what is not needed to go on from a step.

        The newest `keep` checkpoints up to that step stay. Later ones, which were taken back or are damaged, go, and so
        does what interrupted ones left.

        Args:
            keep: at least 1.
            current: the step that the run is at.

        Returns:
            One line for each folder that the system refused to delete: room is lost, nothing else.
        """
        kept = [step for step in self.steps() if step <= current][-keep:]
        leftovers = list(self._path.glob(f"*{_PARTIAL}"))
        surplus = [self.path(step) for step in self._begun() if step not in kept]
        return [fault for fault in map(_delete, (*leftovers, *surplus)) if fault is not None]

    def _begun(self) -> list[int]:
        """Steps with a folder under the name of a checkpoint, ascending."""
        return sorted(step for path in self._path.glob("step_*") if (step := step_of(path.name)) is not None)

    def _manifest(self, step: int) -> tuple[dict[str, Any], dict[str, FileEntry] | None]:
        return read_manifest(self.path(step))

    def _damage(self, step: int, files: Mapping[str, FileEntry]) -> str | None:
        return damage(self.path(step), files)


def step_of(name: str) -> int | None:
    """The step of the checkpoint whose folder has that name; None where it is no checkpoint's."""
    number = name.removeprefix("step_")
    return int(number) if name.startswith("step_") and number.isdecimal() else None


def manifest_data(state: RunState, config: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says besides its files: the state, and the digest of the run's configuration."""
    return {**asdict(state), "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest()}


def _put_in_place(new: Path, target: Path) -> None:
    """Give a folder its name; what had it is kept until then."""
    replaced = target.with_name(f"{target.name}.replaced{_PARTIAL}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    new.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _delete(path: Path) -> str | None:
    """Delete a folder, under a name that no one takes for a checkpoint; what kept the system from it."""
    try:
        if not path.name.endswith(_PARTIAL):
            path = path.rename(path.with_name(path.name + _PARTIAL))
        shutil.rmtree(path)
    except OSError as error:
        return f"{path}: could not be deleted: {error.strerror}"
    return None
