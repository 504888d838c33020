"""Recipe, overrides -> RunConfig, with one line per fault."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ray_rl.config.plain import check_plain, parse_yaml
from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError
from ray_rl.redaction import refuse_secrets
from ray_rl.wording import printable, shown

_MOST_BYTES = 2**20
_DEEPEST_PATH = 16


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("ray_rl") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML of a shipped recipe or of a file.

    Raises:
        ConfigError: neither exists, or the file is no text.
    """
    if recipe in recipe_names():
        return (resources.files("ray_rl") / "recipes" / f"{recipe}.yaml").read_text()
    path = Path(os.path.expanduser(recipe))
    if os.path.isfile(path):  # False also where a name can't be a path
        return text_of(path)
    raise ConfigError(
        f"recipe: {printable(recipe)} is neither a file nor a shipped recipe ({', '.join(recipe_names())})"
    )


def text_of(path: Path, what: str = "recipe") -> str:
    """The text of a file that a person wrote; `what` says in messages what it is.

    Raises:
        ConfigError: it cannot be read, or is no text of a sensible size.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{what}: {path} has {path.stat().st_size / 2**20:.0f} MiB; a {what} is a text of a few KiB"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: {path} is not UTF-8 text ({error}); name a YAML file") from error
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}") from error


def load_config(recipe: str, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> RunConfig:
    """Read a recipe and apply overrides of the form `section.key=value`, whose values are parsed as YAML.

    Args:
        recipe: a shipped recipe's name or a file.
        overrides: applied in turn.
        elsewhere: as of `resolve_config`.

    Raises:
        ConfigError: unreadable, unknown keys, wrong values, contradictions.
    """
    data = parse_yaml(recipe_text(recipe), f"{recipe}:")
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{recipe}: a recipe is a mapping of sections, not a {type(data).__name__}")
    return resolve_config(data, overrides, elsewhere=elsewhere)


def resolve_config(data: Mapping[str, Any], overrides: Sequence[str] = (), *, elsewhere: bool = False) -> RunConfig:
    """Validate a mapping of sections after applying the overrides.

    Args:
        data: section -> its options.
        overrides: applied in turn.
        elsewhere: the run takes place on other machines, so that absolute paths say nothing here; all stay as they are.

    Raises:
        ConfigError: as `load_config`.
    """
    merged = dict(data)
    for override in overrides:
        path, value = parse_override(override)
        merged = with_value(merged, path, value)
    if isinstance(merged.get("task"), str):
        merged["task"] = task_from_text(merged["task"])
    check_plain(merged)
    refuse_secrets(merged)
    for section in _SECTIONS_WITH_KIND:
        if isinstance(merged.get(section), Mapping):
            merged[section] = {"kind": RunConfig.model_fields[section].default.kind, **merged[section]}
    try:
        whole = _with_paths(merged, absolute=not (elsewhere or _is_shipped_folder()))
        return RunConfig.model_validate(whole, context={"elsewhere": elsewhere})
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, _UNKNOWN_KEY))) from error


PATHS = (("model", "path"), ("task", "path"), ("task", "eval_path"), ("reward", "function"))
"""Options that may name a file or folder, `reward.function` with a colon and a name behind it."""


def _with_paths(data: Mapping[str, Any], *, absolute: bool) -> dict[str, Any]:
    """A run may be resumed from another folder; what names a file or folder here is then kept with its whole path."""
    result = dict(data)
    for section, key in PATHS:
        inner = result.get(section)
        value = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(value, str):
            path, colon, function = value.rpartition(":") if key == "function" else (value, "", "")
            if not value.isprintable():
                raise ConfigError(f"{section}.{key}: {shown(value)} holds a line break or another control character")
            local = os.path.expanduser(path)
            if absolute and path and os.path.exists(local):
                result[section] = {**inner, key: f"{Path(local).resolve()}{colon}{function}"}
    return result


def _is_shipped_folder() -> bool:
    """Whether this is a Ray job in the working folder that came with it: each node has a copy of its own, until the job ends."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except ValueError:
        return False
    return bool(isinstance(job, dict) and (job.get("runtime_env") or {}).get("working_dir"))


def task_from_text(text: str) -> dict[str, Any]:
    """The short form of a task, `reasoning-gym:chain_sum?min_terms=2&max_terms=3`, `arithmetic?max_steps=5`, or a data
    set's path, as a section.

    Raises:
        ConfigError: an option without a value.
    """
    head, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"task: option {shown(pair)} has no value; write {printable(pair)}=...")
        options[key] = parse_yaml(value, f"task: {shown(value)} is")
    if head.startswith("reasoning-gym:"):
        return {"kind": "reasoning_gym", "dataset": head.partition(":")[2], "options": options}
    if head == "arithmetic":
        return {"kind": "arithmetic", **options}
    return {"kind": "dataset", "path": head, **options}


def parse_override(override: str) -> tuple[list[str], Any]:
    """The path and the value of `section.key=value`.

    Raises:
        ConfigError: it has another form, or its value is not YAML.
    """
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not path.isprintable() or not all(keys) or len(keys) > _DEEPEST_PATH:
        raise ConfigError(f"{printable(override) or 'an empty one'}: not an override; write section.key=value")
    return keys, parse_yaml(value, f"{path}: {shown(value)} is")


def with_value(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of data with one value set; a changed `kind` clears the keys of the old kind."""
    key, rest = path[0], path[1:]
    result = dict(data)
    if not rest:
        if key == "kind" and data.get("kind") != value:
            return {"kind": value}
        result[key] = value
        return result
    inner = data.get(key)
    if key == "task" and isinstance(inner, str):
        inner = task_from_text(inner)
    result[key] = with_value(inner if isinstance(inner, Mapping) else {}, rest, value)
    return result


def explain(error: ValidationError, unknown_key: str) -> list[str]:
    """The faults that pydantic found, a line each with the path; `unknown_key` says what is wrong with such a one."""
    lines: list[str] = []
    for fault in error.errors():
        location = fault["loc"]
        if location[:2] == _ACTORS and (fault["type"] == "model_type" or _is_range(fault["input"], location)):
            continue  # of its two ways to be written, only the one that was meant is told about
        message = fault["msg"].removeprefix("Value error, ")
        path = ".".join(str(part) for part in _without_tags(location))
        if fault["type"] == "extra_forbidden":
            message = unknown_key
        elif fault["type"] == "missing":
            message = "is required"
        elif fault["type"] not in ("value_error", "union_tag_invalid"):
            message = f"{message} (got {shown(fault['input'])})"
        # Cut by themselves: a long key must not hide what is wrong with it.
        lines.extend(
            f"{printable(path)}: {printable(line)}" if path else printable(line) for line in message.split("\n")
        )
    return lines


_UNKNOWN_KEY = "unknown key; `ray-rl validate --json-schema` lists the known ones"
_ACTORS = ("rollout", "num_actors")
_SECTIONS_WITH_KIND = ("task", "reward", "segmentation", "values", "advantage", "weights")


def _without_tags(location: Sequence[int | str]) -> list[int | str]:
    """pydantic puts into the path what the user's file has no level for: the `kind` of a section, the branch of a union."""
    if len(location) > 1 and location[0] in _SECTIONS_WITH_KIND:
        return [location[0], *location[2:]]
    if location[:2] == _ACTORS:
        return [*_ACTORS, *location[3:]]
    return list(location)


def _is_range(given: object, location: Sequence[int | str]) -> bool:
    return isinstance(given, Mapping) and location[2:] == ("int",)
