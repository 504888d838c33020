"""One shared-memory file per node and published version, which all engines of the node map.

Who still needs a run's files is decided by an flock, not by process ids: every `NodeWeightFile` holds a shared lock on its run's
`.owners` file, the kernel drops it however the process ends, and it works between containers that share the memory but number
their processes differently. Files of a run whose `.owners` can be locked exclusively belong to nobody.

    <folder>/ray-rl-<run_id>.owners     locked shared by every living user of the run on this node
    <folder>/ray-rl-<run_id>.writing    locked exclusively by whoever writes
    <folder>/ray-rl-<run_id>-v<version>.bin
    <folder>/ray-rl-<run_id>.spare      a version that nobody needs any more, whose memory the next one is written into

Memory that a process gets for the first time costs several times as much as the copy into it, hence the spare file.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ray_rl.deadlines import DeadlineExceeded

_PREFIX = "ray-rl-"
_POLL_SECONDS = 0.02


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
        """Where the version lies once it is written."""
        return self._stem(f"-v{version}.bin")

    def ensure(self, version: int, chunks: Callable[[], Iterable[memoryview]], *, timeout: float) -> Path:
        """The file of a version, written by the first process of the node that asks; the others wait for it.

        Args:
            version: of the policy.
            chunks: called once, by the writer, for the contents in order.
            timeout: seconds to wait for another writer.

        Raises:
            DeadlineExceeded: another process held the pen for so long.
            OSError: the file could not be written, for instance because the shared memory is full.
        """

        def fill(descriptor: int) -> int:
            written = 0
            for chunk in chunks():
                _write_at(descriptor, chunk, written)
                written += len(chunk)
            return written

        return self.ensure_filled(version, fill, timeout=timeout)

    def ensure_filled(self, version: int, fill: Callable[[int], int], *, timeout: float) -> Path:
        """As `ensure`, with a writer that may write in any order: `fill` gets a descriptor and returns the file's size."""
        path = self.path(version)
        if path.exists():
            return path
        with _exclusive(self._stem(".writing"), timeout, what=f"another process to write {path}"):
            if not path.exists():
                self._write(path, fill)
        return path

    def discard(self, version: int) -> None:
        """A version's file is no longer needed by any engine: what it holds will be written over. Idempotent."""
        with suppress(FileNotFoundError):
            os.replace(self.path(version), self._stem(".spare"))

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

    def _write(self, path: Path, fill: Callable[[int], int]) -> None:
        # Only the holder of the lock writes, so what an earlier writer left half done is written over.
        partial = path.with_suffix(".partial")
        with suppress(FileNotFoundError):
            os.replace(self._stem(".spare"), partial)
        try:
            # Weights are their owner's; the folder is everybody's.
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, fill(descriptor))
            finally:
                os.close(descriptor)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"writing weights to shared memory failed ({error.strerror})", str(path)
            ) from error
        os.replace(partial, path)


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
        fcntl.flock(descriptor, fcntl.LOCK_SH)
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
    stem = owners.name.removesuffix(".owners")
    pattern = re.compile(re.escape(stem) + r"(-v\d+\.(bin|partial)|\.writing|\.spare)")
    for path in owners.parent.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)
    owners.unlink(missing_ok=True)


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
    deadline = time.monotonic() + timeout
    with open(path, "ab", opener=_private) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"waited {timeout:g} s for {what}, and it did not come") from None
                time.sleep(_POLL_SECONDS)
        yield
