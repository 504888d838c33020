"""A folder in an object store, by URL: whole objects are written, read, listed and deleted, nothing is appended.

Every operation has a deadline and few attempts, and ends with one line. What reaches a store: `ray_rl.store_connection`.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO, TypeVar, cast

import xxhash

from ray_rl.deadlines import call_within
from ray_rl.errors import NotWritten, RunError
from ray_rl.inventory import FileEntry
from ray_rl.store_connection import check_url, connect, scheme_of
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_WITH_FOLDERS = ("file", "local", "hdfs", "sftp", "ssh", "smb")
"""Schemes where a file is visible while it grows, and can be renamed."""
_PARTIAL = ".partial"
PROOF = "proof-"
"""Begins the names of what `ObjectStore.prove` writes; who is killed amid leaves one."""
_BLOCK_BYTES = 8 << 20


class StoreUnreadable(RunError):
    """A store does not answer, or refuses; what lies there may well be whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a store is waited for."""

    seconds: float = 60.0
    """That one attempt may take, besides the time for its bytes."""
    least_rate: float = 4 * 2**20
    """Bytes a second that are the least to count on."""
    attempts: int = 3
    pause: float = 2.0
    """Seconds before the second attempt; twice as long before each later one."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A folder of a store. Names of objects are relative to it, with `/`. It may travel between processes.

    What writes raises NotWritten, what reads StoreUnreadable; FileNotFoundError where an object is not there.
    """

    url: str
    """Without a slash at the end."""
    patience: Patience = Patience()

    @classmethod
    def of(cls, url: str, patience: Patience | None = None) -> ObjectStore:
        """The folder of a URL that a user gave. Nothing is asked of the store yet.

        Raises:
            ConfigError: it is no URL of a store, or what its scheme needs is not installed.
        """
        check_url(url)
        store = cls(url.rstrip("/"), patience or Patience())
        store._at()
        return store

    def __truediv__(self, name: str) -> ObjectStore:
        """A folder below this one."""
        return ObjectStore(f"{self.url}/{name}", self.patience)

    def __str__(self) -> str:
        return self.url

    @property
    def parent(self) -> ObjectStore:
        """The folder that this one lies in."""
        return ObjectStore(self.url.rpartition("/")[0], self.patience)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def sizes(self) -> dict[str, int]:
        """Every object below the folder: name -> bytes. Empty where there is no such folder."""

        def listed() -> dict[str, int]:
            from pyarrow.fs import FileSelector, FileType

            files, root = self._at()
            found = files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
            names = {info.path: info.size for info in found if info.type == FileType.File}
            return {
                str(PurePosixPath(path).relative_to(root)): size
                for path, size in sorted(names.items())
                if not path.endswith(_PARTIAL)
            }

        with _reading(self.url):
            return self._tried(listed, "to be listed")

    def read(self, name: str) -> bytes:
        """What a small object holds."""

        def read() -> bytes:
            with self._open(name) as stream:
                return stream.read()

        with _reading(f"{self}/{name}"):
            return self._tried(read, f"to give {name}")

    def entry(self, name: str) -> FileEntry:
        """Size and digest of an object, all of which is read."""
        with _reading(f"{self}/{name}"):
            size = self._tried(partial(self._size, name), f"to tell the size of {name}")
            return self._tried(partial(self._digested, name), f"to give {name}", size)

    def fetch(self, name: str, file: Path) -> FileEntry:
        """Copy an object into a file, whose folder is made; size and digest of what came."""

        def fetch() -> FileEntry:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as copy:
                return self._digested(name, copy)

        with _reading(f"{self}/{name}"):
            size = self._tried(partial(self._size, name), f"to tell the size of {name}")
            return self._tried(fetch, f"to give {name}", size)

    def write(self, name: str, data: bytes) -> None:
        """Make an object, or replace it."""

        def put(path: str) -> None:
            with self._at()[0].open_output_stream(path) as stream:
                stream.write(data)

        with _writing(f"{self}/{name}"):
            self._tried(partial(self._put, name, put), f"to take {name}", len(data))

    def send(self, file: Path, name: str) -> None:
        """Copy a file into an object, which is made or replaced: as much as it has now, if it is one that grows."""

        size = 0

        def put(path: str) -> None:
            left = size
            with file.open("rb") as source, self._at()[0].open_output_stream(path) as stream:
                while left and (block := source.read(min(left, _BLOCK_BYTES))):
                    stream.write(block)
                    left -= len(block)

        with _writing(f"{self}/{name}"):
            size = file.stat().st_size
            self._tried(partial(self._put, name, put), f"to take {name}", size)
            there = self._tried(partial(self._size, name), f"to tell the size of {name}")
            if there != size:
                raise OSError(f"{there} of {size} bytes arrived")

    def copy(self, name: str, target: ObjectStore) -> None:
        """Copy an object to the same name in another folder of the same store."""
        files, source = self._at(name)

        def put(path: str) -> None:
            files.copy_file(source, path)

        with _writing(f"{target}/{name}"):
            size = self._tried(partial(self._size, name), f"to tell the size of {name}")
            self._tried(partial(target._put, name, put), f"to copy {name}", size)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with _writing(f"{self}/{name}"):
            self._tried(partial(self._delete, name), f"to delete {name}")

    def prove(self) -> None:
        """See that objects can be written, read and deleted here, from this machine.

        Raises:
            NotWritten: they cannot, or another one comes back than was written.
            StoreUnreadable: they cannot be read.
        """
        name, text = f"{PROOF}{uuid.uuid4().hex}", b"ray-rl has tried whether it can write here; this can be deleted"
        self.write(name, text)
        try:
            answer = self.read(name)
        except FileNotFoundError:
            answer = b""
        finally:
            self.delete(name)
        if answer != text:
            raise NotWritten(f"{self}: does not give back what was written just now; use another store")

    def delete_all(self) -> None:
        """Delete the folder, if it is there, and everything below it."""

        def delete() -> None:
            files, root = self._at()
            try:
                files.delete_dir(root)
            except FileNotFoundError:
                return

        with _writing(self.url):
            self._tried(delete, "to be deleted")

    def _at(self, name: str = "") -> tuple[FileSystem, str]:
        files, root = connect(self.url)
        return files, f"{root}/{name}" if name else root

    def _open(self, name: str) -> BinaryIO:
        files, path = self._at(name)
        return cast(BinaryIO, files.open_input_stream(path))

    def _size(self, name: str) -> int:
        from pyarrow.fs import FileType

        files, path = self._at(name)
        info = files.get_file_info(path)
        if info.type != FileType.File:
            raise FileNotFoundError(f"{self}/{name}")
        return info.size

    def _digested(self, name: str, copy: IO[bytes] | None = None) -> FileEntry:
        digest, size = xxhash.xxh3_128(), 0
        with self._open(name) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                if copy is not None:
                    copy.write(block)
        return FileEntry(bytes=size, xxh3=digest.hexdigest())

    def _put(self, name: str, put: Callable[[str], None]) -> None:
        """Make an object by `put`, under another name first where one would see it grow."""
        files, path = self._at(name)
        if scheme_of(self.url) not in _WITH_FOLDERS:
            put(path)
            return
        files.create_dir(str(PurePosixPath(path).parent), recursive=True)
        partial_path = f"{path}.{uuid.uuid4().hex}{_PARTIAL}"  # another writer's would be another one
        put(partial_path)
        files.move(partial_path, path)

    def _delete(self, name: str) -> None:
        files, path = self._at(name)
        try:
            files.delete_file(path)
        except FileNotFoundError:
            return

    def _tried(self, work: Callable[[], T], what: str, size: int = 0) -> T:
        """Work within the deadline, once more after an error of the store's; the last one is raised as OSError."""
        patience = self.patience
        seconds = patience.seconds + size / patience.least_rate
        for attempt in range(1, patience.attempts + 1):
            try:
                return call_within(work, seconds, what=f"{self} {what}")
            except FileNotFoundError:
                raise
            except Exception as error:
                if not _is_a_stores(error):
                    raise
                if attempt == patience.attempts:
                    raise OSError(f"{one_line(error)} (attempt {attempt} of {attempt})") from error
            time.sleep(patience.pause * 2 ** (attempt - 1))
        raise AssertionError("no attempt was allowed")


Place = Path | ObjectStore
"""A folder that all nodes reach: on storage that they share, or in an object store."""


def is_url(text: str) -> bool:
    """Whether a user means an object store by it, and not a path."""
    return _SCHEME.match(text) is not None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        mend = "check the network, the credentials in the environment and what they permit; then try again"
        raise StoreUnreadable(f"{what}: cannot be read: {one_line(error)}; {mend}") from error


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        mend = "check the network, the credentials in the environment and what they permit"
        raise NotWritten(f"{what}: could not be written: {one_line(error)}; {mend}") from error


def _is_a_stores(error: Exception) -> bool:
    """Every package for a store has errors of its own, which share no class; Python's own, but OSError, are bugs."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in ("builtins", "ray_rl")
