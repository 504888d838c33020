"""One shared-memory file per node and published version, which all engines of the node map.

Who still needs a run's files is decided by an flock, not by process ids: every `NodeWeightFile` holds a shared lock on its run's
`.owners` file, the kernel drops it however the process ends, and it works between containers that share the memory but number
their processes differently. Files of a run whose `.owners` can be locked exclusively belong to nobody.

    <folder>/ray-rl-<run_id>.owners                 locked shared by every living user of the run on this node
    <folder>/ray-rl-<run_id>.writing                locked exclusively by whoever writes
    <folder>/ray-rl-<run_id>-v<version>.bin         the version that was last written here, for engines that join later too
    <folder>/ray-rl-<run_id>-v<version>.partial     one that is being written

Memory that a process gets for the first time costs several times as much as the copy into it, so a version is written into the
file of the one before it, and nobody need discard any. Who still reads the older one then reads a mixture: its digests tell.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path

from ray_rl.deadlines import Deadline
from ray_rl.errors import NotWritten

_PREFIX = "ray-rl-"
_POLL_SECONDS = 0.02
_SWEEP_SECONDS = 60.0
_VERSIONS = r"-v\d+\.(bin|partial)"


def shared_memory_folder() -> Path:
    """Where files live in memory; the temporary folder where the system has no such place."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() else Path(tempfile.gettempdir())


class NodeWeightFile:
    """The files of one run on this node, as one of its processes sees them."""

    def __init__(self, run_id: str, folder: Path | None = None) -> None:
        """Declare this process a user of the run's files, and remove those of runs that nobody uses any more.

        Args:
            run_id: letters, digits, `_`, `.` and `-`.
            folder: unset, the shared memory of this machine.

        Raises:
            ValueError: the run_id can't be part of a file's name.
        """
        if not re.fullmatch(r"[\w.-]+", run_id):
            raise ValueError(f"run id {run_id!r}: use letters, digits, '_', '.' and '-'")
        self._run_id = run_id
        self._folder = folder or shared_memory_folder()
        self._owners: int | None = _lock_owners(self._stem(".owners"))
        sweep_dead(self._folder)

    @property
    def identity(self) -> str:
        """The same for two processes exactly when they see the same files."""
        owners = os.stat(self._stem(".owners"))
        return f"{_machine()}:{owners.st_dev}:{owners.st_ino}"

    def path(self, version: int) -> Path:
        """Where the version lies once it is written, until another one is."""
        return self._stem(f"-v{version}.bin")

    def ensure(self, version: int, chunks: Callable[[], Iterable[memoryview]], *, timeout: float) -> Path:
        """The file of a version, written by the first process of the node that asks; the others wait for it.

        Args:
            version: of the policy.
            chunks: called once, by the writer, for the contents in order.
            timeout: seconds to wait for another writer.

        Raises:
            DeadlineExceeded: another process held the pen for so long.
            NotWritten: the file could not be written, for instance because the shared memory is full.
        """

        def fill(descriptor: int) -> int:
            written = 0
            for chunk in chunks():
                _write_at(descriptor, chunk, written)
                written += len(chunk)
            return written

        path = self.path(version)
        if path.exists():
            return path
        with self._pen(path, timeout):
            if not path.exists():
                self._write(path, fill)
        return path

    def write(self, version: int, fill: Callable[[int], int], *, timeout: float) -> Path:
        """The file of a version, written anew whether there was one or not.

        Args:
            version: of the policy.
            fill: gets a descriptor, writes in any order and returns the file's size.
            timeout: seconds to wait for another writer.

        Raises:
            DeadlineExceeded: as `ensure`.
            NotWritten: as `ensure`.
        """
        path = self.path(version)
        with self._pen(path, timeout):
            self._write(path, fill)
        return path

    def remove(self, version: int) -> None:
        """Remove a version's file and give its memory back; engines that have mapped it keep their mapping. Idempotent."""
        self.path(version).unlink(missing_ok=True)

    def close(self) -> None:
        """This process is done; the last one of the run on this node removes all of the run's files. Idempotent."""
        if self._owners is not None:
            os.close(self._owners)
            self._owners = None
            _sweep_if_dead(self._stem(".owners"))

    def _stem(self, ending: str) -> Path:
        return self._folder / f"{_PREFIX}{self._run_id}{ending}"

    def _pen(self, path: Path, timeout: float) -> AbstractContextManager[None]:
        return _exclusive(self._stem(".writing"), timeout, what=f"another process to write {path}")

    def _write(self, path: Path, fill: Callable[[int], int]) -> None:
        partial = self._take_older(path.with_suffix(".partial"))
        try:
            # Weights are their owner's; the folder is everybody's.
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, fill(descriptor))
            finally:
                os.close(descriptor)
        except TimeoutError:
            raise  # an OSError too, but the contents did not come
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise NotWritten(
                f"{path}: the weights could not be written to shared memory: {error.strerror or error}; give this machine "
                "or container more of it, or end what else uses it"
            ) from error
        os.replace(partial, path)

    def _take_older(self, partial: Path) -> Path:
        """Turn what there is of any version, whole or left by a writer that died, into the file to write; it need not exist."""
        found = _files_of(self._folder, f"{_PREFIX}{self._run_id}", _VERSIONS)
        if found:
            # A whole one rather than a partial one: the processes of this node have it mapped already.
            kept, *surplus = sorted(found, key=lambda path: path.suffix)
            for path in surplus:
                path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # removed meanwhile
                os.replace(kept, partial)
        return partial


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """All bytes of the content, from a place of the file on."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def sweep(run_id: str, folder: Path | None = None) -> None:
    """Remove everything of a run from this node, used or not: for whoever ends the run. Idempotent."""
    _remove_run((folder or shared_memory_folder()) / f"{_PREFIX}{run_id}.owners")


def sweep_dead(folder: Path | None = None) -> None:
    """Remove the files of all runs that no living process of this node uses."""
    for owners in (folder or shared_memory_folder()).glob(f"{_PREFIX}*.owners"):
        _sweep_if_dead(owners)


def _lock_owners(path: Path) -> int:
    """A descriptor that holds a shared lock on the file of that name; a sweeper may remove the name meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Only who sweeps holds it alone, for as long as removing a few files takes.
        _lock(descriptor, fcntl.LOCK_SH, Deadline(_SWEEP_SECONDS, what=f"the files of {path} to be swept"))
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


def _sweep_if_dead(owners: Path) -> None:
    try:
        descriptor = os.open(owners, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # removed meanwhile, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(descriptor, owners):
            _remove_run(owners)
    except BlockingIOError:
        return  # somebody lives
    finally:
        os.close(descriptor)


def _remove_run(owners: Path) -> None:
    # `.owners` last: while it exists, an interrupted sweep is taken up by the next one.
    for path in _files_of(owners.parent, owners.name.removesuffix(".owners"), rf"({_VERSIONS}|\.writing)"):
        path.unlink(missing_ok=True)
    owners.unlink(missing_ok=True)


def _files_of(folder: Path, stem: str, endings: str) -> list[Path]:
    pattern = re.compile(re.escape(stem) + endings)
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


@cache
def _machine() -> str:
    """Tells this machine, since its last start, from any other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else str(uuid.getnode())


def _private(path: str, flags: int) -> int:
    # Weights are their owner's; the folder is everybody's.
    return os.open(path, flags, 0o600)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive(path: Path, timeout: float, *, what: str) -> Iterator[None]:
    with open(path, "ab", opener=_private) as file:
        causes = "it writes to a slow or full memory, or was stopped amid"
        _lock(file.fileno(), fcntl.LOCK_EX, Deadline(timeout, what=what, causes=causes))
        yield


def _lock(descriptor: int, operation: int, deadline: Deadline) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline.check()
            time.sleep(_POLL_SECONDS)
