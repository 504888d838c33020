"""A first look at a model's folder: whether everything is there and whole, at the cost of reading a few headers.

Whoever loads the model would notice too, but in an actor, minutes after the start, and in words about something else.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_rl.errors import ConfigError
from ray_rl.wording import one_line, printable, shown

_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100 * 2**20
"""As the safetensors library has it."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


def check_model_folder(path: str) -> None:
    """Whether a local folder holds a model in Hugging Face format; a name on the Hub passes.

    Raises:
        ConfigError: no or a broken config.json; weights that are missing or were cut off.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return
    config = _object(folder / "config.json", "give a folder in Hugging Face format")
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"model.path: {folder / 'config.json'} names no model_type; is it a model's?")
    for file in _weights(folder):
        try:
            _check_weights(file)
        except OSError as error:
            raise ConfigError(f"model.path: {file} cannot be read: {one_line(error)}") from error


def _weights(folder: Path) -> Iterator[Path]:
    """The files that hold the weights."""
    for name in (_WHOLE[0], *_INDEXES, _WHOLE[1]):
        file = folder / name
        if not os.path.isfile(file):
            continue
        if name in _WHOLE:
            yield file
            return
        parts = _object(file, "fetch the model again").get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ConfigError(f"model.path: {file} has no weight_map; fetch the model again")
        for part in sorted(set(parts.values())):
            if not os.path.isfile(folder / part):
                raise ConfigError(
                    f"model.path: {folder} lacks {printable(part)}, which its {name} names; fetch it again"
                )
            yield folder / part
        return
    raise ConfigError(f"model.path: {folder} has no weights (model.safetensors or its index); fetch the model again")


def _check_weights(file: Path) -> None:
    """A file of tensors is as long as its header says; the older format has no header."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        if not size:
            raise ConfigError(f"model.path: {file} is empty; fetch the model again")
        return
    with file.open("rb") as opened:
        start = opened.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        header = opened.read(length) if length <= min(size - _LENGTH.size, _LONGEST_HEADER) else b""
    try:
        tensors = json.loads(header)
        needed = _LENGTH.size + length + max(ends) if (ends := _ends(tensors)) else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        needed = None
    if needed is None:
        raise ConfigError(f"model.path: {file} is not a safetensors file with weights; fetch the model again")
    if size < needed:
        raise ConfigError(f"model.path: {file} was cut off: it has {size} of {needed} bytes; fetch the model again")


def _ends(tensors: Any) -> list[int]:
    """Where each tensor ends, in bytes after the header."""
    return [int(tensor["data_offsets"][1]) for name, tensor in tensors.items() if name != "__metadata__"]


def _object(file: Path, mend: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model.path: {file.parent} has no {file.name}; {mend}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {file} cannot be read ({one_line(error)}); {mend}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model.path: {file} must hold an object, not {shown(found)}; {mend}")
    return found
