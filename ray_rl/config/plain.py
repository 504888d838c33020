"""What a user may write in a recipe or an override, as plain values: what JSON knows, of a size that a recipe has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ray_rl.errors import ConfigError
from ray_rl.wording import one_line, shown

_MOST_VALUES = 20_000
_DEEPEST = 32
_LARGEST = 2**63


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` is what the message says "not valid YAML" of.

    Raises:
        ConfigError: not YAML.
    """
    try:
        return yaml.safe_load(text)
    # PyYAML lets through what its constructors stumble over: 2020-13-45, !!int "", an endless [[[[, ...
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} not valid YAML: {one_line(error)}") from error


def check_plain(data: Mapping[str, Any]) -> None:
    """Whether a recipe's values can be checked, shown and kept with the run.

    Aliases (`*name`) count as often as they are used, so that a short text can't stand for an endless one.

    Raises:
        ConfigError: something else than mappings, lists, text, numbers, true, false and null; or too much of it.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), data)]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        path, value = waiting.pop()
        if fault := _fault(value):
            raise ConfigError(f"{'.'.join(path) or 'recipe'}: {fault}")
        if len(path) == _DEEPEST:
            raise ConfigError(f"{'.'.join(path[:3])}: nested deeper than {_DEEPEST} levels; make it simpler")
        if isinstance(value, Mapping):
            waiting.extend(((*path, key), inner) for key, inner in value.items())
        elif isinstance(value, list | tuple):
            waiting.extend(((*path, str(index)), inner) for index, inner in enumerate(value))
    raise ConfigError(f"recipe: more than {_MOST_VALUES} values; keep data in files and name them")


def _fault(value: object) -> str | None:
    match value:
        case None | bool() | float():
            return None
        case int():
            return None if -_LARGEST <= value < _LARGEST else "a number of more than 64 bits; use a smaller one"
        case str():
            return None if _is_text(value) else f"{shown(value)} holds half a character (a lone surrogate); remove it"
        case list() | tuple():
            return None
        case Mapping():
            odd = [key for key in value if not (isinstance(key, str) and key and key.isprintable())]
            return (
                f"{shown(odd[0])} is no name of an option; use text, in quotes where YAML reads it otherwise"
                if odd
                else None
            )
    return f"{shown(value)} is a {type(value).__name__}; put it in quotes to mean the text"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
