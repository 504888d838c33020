"""Rows of a data set: a JSONL, JSON or parquet file, a folder of such, a saved or a Hugging Face dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ray_rl.config.task import DatasetTaskConfig
from ray_rl.errors import ConfigError
from ray_rl.tasks import Split
from ray_rl.wording import one_line, printable

Rows = list[dict[str, Any]]

_MOST_ENTRIES = 100_000
"""Of a folder of data: more are a whole disk that was named by mistake."""


def read_rows(config: DatasetTaskConfig, split: Split) -> Rows:
    """All rows of a split.

    Raises:
        ConfigError: not there, unreadable, or without such a split.
    """
    own_file = split == "eval" and config.eval_path is not None
    field, path = ("eval_path", str(config.eval_path)) if own_file else ("path", config.path)
    name = config.train_split if split == "train" else config.eval_split
    local = Path(os.path.expanduser(path))
    # os.path: what can't be a path (too long, with a null byte) is none, where pathlib would raise.
    if os.path.isfile(local):
        if split == "eval" and not own_file:
            raise ConfigError(
                f"task.eval_path: {path} is one file without splits; name the file with the held-out rows"
            )
        return _read_file(field, local)
    if any(os.path.isfile(local / mark) for mark in ("dataset_dict.json", "state.json")):
        return _read_saved(field, local, f"{split}_split", name)
    if os.path.isdir(local):
        return _read_folder(field, local, f"{split}_split", name)
    if path.startswith((".", "/", "~")) or local.suffix in _READERS or own_file:
        raise ConfigError(
            f"task.{field}: {printable(path)} does not exist; name a file, a folder or a Hugging Face dataset"
        )
    return _read_hub(config, f"{split}_split", name)


def _read_folder(field: str, folder: Path, split_field: str, name: str) -> Rows:
    """The files that belong to a split by their name (``train.jsonl``, ``train-00000-of-00002.parquet``) or folder."""
    try:
        entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
        files = sorted(path for path in entries if path.suffix in _READERS and path.is_file())
    except OSError as error:
        raise ConfigError(f"task.{field}: {folder} cannot be read: {one_line(error)}") from error
    if len(entries) > _MOST_ENTRIES:
        raise ConfigError(f"task.{field}: {folder} holds more than {_MOST_ENTRIES} files; name the folder of the data")
    chosen = [path for path in files if _belongs(path.relative_to(folder), name)]
    if not chosen:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or "no .jsonl, .json or .parquet file"
        raise ConfigError(f"task.{split_field}: no file of split {name!r} in {folder}; it has: {found}")
    return list(chain.from_iterable(_read_file(field, path) for path in chosen))


def _belongs(path: Path, split: str) -> bool:
    if split in path.parts[:-1]:
        return True
    rest = path.stem.removeprefix(split) if path.stem.startswith(split) else None
    return rest is not None and (not rest or rest[0] in "-_.")


def _read_file(field: str, path: Path) -> Rows:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ConfigError(f"task.{field}: {path} is none of {', '.join(_READERS)}; unpack or convert it")
    try:
        return list(reader(field, path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"task.{field}: {path} is not UTF-8 text ({error.reason} at byte {error.start}); unpack or convert it"
        ) from error
    except OSError as error:
        raise ConfigError(f"task.{field}: {path} cannot be read: {one_line(error)}") from error


def _jsonl(field: str, path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(field, f"{path} line {number}", _parse(field, f"{path} line {number}", line))


def _json(field: str, path: Path) -> Iterator[dict[str, Any]]:
    """A list of objects, or (as Hugging Face writes it) one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(1024).lstrip()[:1]
    if first != "[":
        yield from _jsonl(field, path)
        return
    for number, row in enumerate(_parse(field, str(path), path.read_text(encoding="utf-8-sig"))):
        yield _object(field, f"{path} entry {number}", row)


def _parse(field: str, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    # Numbers of thousands of digits are a ValueError of int(), and what never stops nesting exhausts the parser.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"task.{field}: {where}: not valid JSON ({one_line(error)})") from error


def _object(field: str, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"task.{field}: {where}: a row must be an object with columns, not {type(value).__name__}")
    return value


def _parquet(field: str, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not memory-mapped, and not by name: pyarrow would read more from the name than a file (partitions, a URI).
        with path.open("rb") as file:
            yield from pyarrow.parquet.read_table(file).to_pylist()
    except UnicodeDecodeError as error:
        raise ConfigError(f"task.{field}: {path}: a text column is not UTF-8 ({error.reason})") from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"task.{field}: {path}: not a parquet file ({one_line(error)})") from error


_READERS: dict[str, Callable[[str, Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _read_saved(field: str, folder: Path, split_field: str, name: str) -> Rows:
    """What `datasets.save_to_disk` wrote: several splits, or one that serves as every split but the held-out one."""
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if name not in saved:
                raise ConfigError(f"task.{split_field}: no split {name!r} in {folder}; it has: {', '.join(saved)}")
            saved = saved[name]
        elif split_field == "eval_split" and field == "path":
            raise ConfigError(
                f"task.eval_path: {folder} is one dataset without splits; name the one with the held-out rows"
            )
        return saved.to_list()
    # It stumbles, over whatever it finds, in the middle of reading its own descriptions.
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"task.{field}: {folder} is not a whole saved dataset ({type(error).__name__}: {one_line(error)})"
        ) from error


def _read_hub(config: DatasetTaskConfig, split_field: str, name: str) -> Rows:
    import datasets

    try:
        return datasets.load_dataset(config.path, config.subset, split=name).to_list()
    except ValueError as error:
        # Raised for an unknown split as well as for an unknown or missing subset; the message says which.
        raise ConfigError(f"task.{split_field}, task.subset: {config.path}: {one_line(error)}") from error
    # RuntimeError: it is a script, which is somebody else's program.
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"task.path: {config.path} is neither a local path nor a dataset that could be fetched: {one_line(error)}"
        ) from error
