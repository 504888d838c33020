"""What a folder holds, written down when it is whole and compared before it is trusted.

`manifest.json` has the data that its writer wants to keep, size and digest of every other file of the folder, and a digest of
its own text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ray_rl.errors import RunError

MANIFEST = "manifest.json"
_BLOCK_BYTES = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)
_NAMED_FAULTS = 3


class Damaged(ValueError):
    """A folder is not what was written; the message names the files, in one line."""


class Unreadable(RunError):
    """The system does not let a file be read; it may well be what was written, so nothing is concluded from that."""

    def __init__(self, folder: Path, name: str, error: OSError) -> None:
        """`name`: of the file in the folder; `error`: what the system said."""
        mend = f"try again when the storage answers, or move {folder} away if it is broken for good"
        super().__init__(f"{folder / name}: cannot be read: {error.strerror}; {mend}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file as it was written."""

    bytes: int
    """Its size."""
    xxh3: str
    """XXH3 of its contents, 128 bits in hexadecimal: it finds every accident at the speed of memory, but no forgery."""


def take(folder: Path, *, sync: bool = False) -> dict[str, FileEntry]:
    """Every file below a folder but its manifest: path in the folder, with `/` -> entry. Reads them all.

    Args:
        folder: that nobody writes to meanwhile.
        sync: also have the system put files and folders on the disk, and wait for that.

    Raises:
        OSError: the system refused.
    """
    found = sorted(folder.rglob("*"))
    files = [path for path in found if path.is_file() and path != folder / MANIFEST]
    with ThreadPoolExecutor(_THREADS) as threads:  # digests are taken without the interpreter's lock
        entries = list(threads.map(partial(_entry, sync=sync), files))
    if sync:
        for path in (*filter(Path.is_dir, found), folder):
            sync_folder(path)
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(files, entries, strict=True)}


def damage(folder: Path, files: Mapping[str, FileEntry]) -> str | None:
    """What differs in a folder from what it held, in one line with the first few names; None: nothing. More files don't matter.

    Sizes come first; contents are read where all of them are right.

    Raises:
        Unreadable: whether something differs cannot be said.
    """
    faults = [fault for fault in map(partial(_size_fault, folder), files, files.values()) if fault]
    if not faults:
        with ThreadPoolExecutor(_THREADS) as threads:
            faults = [fault for fault in threads.map(partial(_content_fault, folder), files, files.values()) if fault]
    return in_a_line(faults)


def in_a_line(faults: Sequence[str]) -> str | None:
    """The first few faults, and how many more there are; None where there is none."""
    if not faults:
        return None
    more = len(faults) - _NAMED_FAULTS
    return ", ".join(faults[:_NAMED_FAULTS]) + (f", and {more} more" if more > 0 else "")


def _entry(path: Path, *, sync: bool = False) -> FileEntry:
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
        if sync:
            os.fsync(file.fileno())
    return FileEntry(bytes=size, xxh3=digest.hexdigest())


def _size_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        size = None
    except OSError as error:
        raise Unreadable(folder, name, error) from error
    return size_fault(name, entry, size)


def size_fault(name: str, entry: FileEntry, size: int | None) -> str | None:
    """What is wrong with the size of a file, None where it is missing."""
    if size is None:
        return f"{name} is missing"
    longer = size - entry.bytes
    if longer:
        return f"{name} is {abs(longer)} bytes {'longer' if longer > 0 else 'shorter'} than it was written"
    return None


def _content_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        return content_fault(name, entry, _entry(folder / name))
    except OSError as error:
        raise Unreadable(folder, name, error) from error


def content_fault(name: str, entry: FileEntry, found: FileEntry) -> str | None:
    """What is wrong with what a file holds."""
    return None if found == entry else f"{name} is not what was written"


def write_manifest(folder: Path, data: Mapping[str, Any], files: Mapping[str, FileEntry]) -> None:
    """Write a folder's manifest, whole or not at all.

    Args:
        folder: what it lists.
        data: JSON's, without the keys `files` and `xxh3`.
        files: of `take`.

    Raises:
        OSError: the system refused.
    """
    write_atomically(folder / MANIFEST, manifest_text(data, files))


def manifest_text(data: Mapping[str, Any], files: Mapping[str, FileEntry]) -> str:
    """What stands in a manifest; arguments as those of `write_manifest`."""
    manifest = {**data, "files": {name: asdict(entry) for name, entry in files.items()}}
    return json.dumps({**manifest, "xxh3": _digest(manifest)}, indent=2) + "\n"


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, FileEntry] | None]:
    """The data and the files that `write_manifest` was given; no files where an older version of the program wrote it.

    Raises:
        Damaged: it is missing, or not what was written.
        Unreadable: which of the two cannot be said.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise Unreadable(folder, MANIFEST, error) from error
    return parse_manifest(text)


def parse_manifest(text: bytes) -> tuple[dict[str, Any], dict[str, FileEntry] | None]:
    """As `read_manifest`, of what stands in one.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        data = dict(json.loads(text))
        digest = data.pop("xxh3", None)
        if digest is None and "files" not in data:
            return data, None
        if digest != _digest(data):
            raise ValueError("another digest")
        return data, {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not what was written") from error


def _digest(data: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True).encode())


def write_atomically(path: Path, text: str) -> None:
    """All of the text or none of it, also when the machine stops amid.

    Raises:
        OSError: the system refused; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the system put the names in a folder on the disk, and wait for that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
