"""The checkpoints of a run in an object store: `ray_rl.checkpoints`, where no folder can be renamed.

A checkpoint's manifest is written last and deleted first, and what has none does not exist to a reader. The ranks of the learner
put their files there themselves, each from its node, and say what they put.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_rl.checkpoints import Checkpoints, NewCheckpoint, RunState, manifest_data, step_of
from ray_rl.errors import NotWritten
from ray_rl.inventory import (
    MANIFEST,
    Damaged,
    FileEntry,
    content_fault,
    in_a_line,
    manifest_text,
    parse_manifest,
    size_fault,
)
from ray_rl.object_store import ObjectStore, Place, StoreUnreadable


class NewStoredCheckpoint(NewCheckpoint):
    """A checkpoint in the making, of which nobody sees anything yet."""

    def __init__(self, store: ObjectStore, before: Callable[[], None]) -> None:
        """Of `StoredCheckpoints.new`.

        Args:
            store: the folder to write into.
            before: called when all files are there.
        """
        self._store = store
        self._before = before
        self._found: dict[str, FileEntry] = {}
        self._files = None

    @property
    def place(self) -> Place:
        """As `NewCheckpoint.place`."""
        return self._store

    def add(self, name: str, files: Mapping[str, FileEntry]) -> None:
        """As `NewCheckpoint.add`."""
        self._found |= {f"{name}/{file}": entry for file, entry in files.items()}

    def seal(self) -> dict[str, FileEntry]:
        """See that what was put is there, as far as the store tells, and bring the rest of the run there, once.

        Raises:
            NotWritten: something is missing, or the store refused.
        """
        if self._files is None:
            sizes = self._store.sizes()
            faults = [fault for name, file in self._found.items() if (fault := size_fault(name, file, sizes.get(name)))]
            if faults:
                raise NotWritten(f"{self._store}: not all of it arrived: {in_a_line(faults)}")
            self._before()
            self._files = self._found
        return self._files


class StoredCheckpoints(Checkpoints):
    """``step_N/{manifest.json,learner,policy}`` in a folder of a store. Errors are those of `ObjectStore`."""

    def __init__(
        self, store: ObjectStore, *, before_deletion: Callable[[], None], before_manifest: Callable[[], None]
    ) -> None:
        """Of a run.

        Args:
            store: the folder.
            before_deletion: refuses where another has the run, whose checkpoints these are then.
            before_manifest: brings there what a checkpoint needs besides its files, and refuses where another has the run.
        """
        self._store = store
        self._before_deletion = before_deletion
        self._before = before_manifest

    def path(self, step: int) -> Place:  # type: ignore[override]
        """As `Checkpoints.path`."""
        return self._folder(step)

    def steps(self) -> list[int]:
        """As `Checkpoints.steps`."""
        return [step for step, names in self._found().items() if MANIFEST in names]

    @contextmanager
    def new(self, state: RunState, config: Path) -> Iterator[NewCheckpoint]:
        """As `Checkpoints.new`; where the block fails, what it leaves is for `prune`."""
        folder = self._folder(state.step)
        try:
            self._before_deletion()
            self._delete_step(state.step)
            new = NewStoredCheckpoint(folder, self._before)
            yield new
            text = manifest_text(manifest_data(state, config), new.seal())
            folder.write(MANIFEST, text.encode())
        except StoreUnreadable as error:  # a run goes on without a checkpoint until the store answers again
            raise NotWritten(str(error)) from error

    def prune(self, keep: int, current: int) -> list[str]:
        """As `Checkpoints.prune`."""
        try:
            self._before_deletion()
        except StoreUnreadable as error:
            return [str(error)]
        return self._keep(lambda whole: [step for step in whole if step <= current][-keep:])

    def sweep(self) -> list[str]:
        """Delete what interrupted checkpoints left; for who holds the run. Returns as `prune` does."""
        return self._keep(lambda whole: whole)

    def _keep(self, choose: Callable[[list[int]], list[int]]) -> list[str]:
        """Delete all but those that are chosen of the steps, ascending, with a manifest."""
        try:
            found = self._found()
        except StoreUnreadable as error:
            return [str(error)]
        kept = choose([step for step, names in found.items() if MANIFEST in names])
        faults = []
        for step in found.keys() - set(kept):
            try:
                self._delete_step(step)
            except NotWritten as error:
                faults.append(str(error))
        return faults

    def _folder(self, step: int) -> ObjectStore:
        return self._store / f"step_{step}"

    def _delete_step(self, step: int) -> None:
        """From the first moment on nobody takes what is left for a checkpoint."""
        folder = self._folder(step)
        folder.delete(MANIFEST)
        folder.delete_all()

    def _found(self) -> dict[int, set[str]]:
        """Names of the files by step, ascending."""
        found: dict[int, set[str]] = {}
        for name in self._store.sizes():
            folder, _, file = name.partition("/")
            if file and (step := step_of(folder)) is not None:
                found.setdefault(step, set()).add(file)
        return dict(sorted(found.items()))

    def _begun(self) -> list[int]:
        return self.steps()

    def _manifest(self, step: int) -> tuple[dict[str, Any], dict[str, FileEntry] | None]:
        return stored_manifest(self._folder(step))

    def _damage(self, step: int, files: Mapping[str, FileEntry]) -> str | None:
        folder = self._folder(step)
        sizes = folder.sizes()
        faults = [fault for name, file in files.items() if (fault := size_fault(name, file, sizes.get(name)))]
        if not faults:
            faults = [fault for name, file in files.items() if (fault := _content_fault(folder, name, file))]
        return in_a_line(faults)


def stored_manifest(folder: ObjectStore) -> tuple[dict[str, Any], dict[str, FileEntry] | None]:
    """As `read_manifest`, of a folder in a store. Raises StoreUnreadable, too."""
    try:
        return parse_manifest(folder.read(MANIFEST))
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error


def _content_fault(folder: ObjectStore, name: str, file: FileEntry) -> str | None:
    try:
        return content_fault(name, file, folder.entry(name))
    except FileNotFoundError:  # gone since the folder was listed
        return size_fault(name, file, None)
