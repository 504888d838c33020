"""Recipe, overrides -> RunConfig, with one line per fault."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("ray_rl") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML of a shipped recipe or of a file.

    Raises:
        ConfigError: neither exists.
    """
    if recipe in recipe_names():
        return (resources.files("ray_rl") / "recipes" / f"{recipe}.yaml").read_text()
    path = Path(recipe).expanduser()
    if path.is_file():
        return path.read_text()
    raise ConfigError(f"recipe: {recipe} is neither a file nor a shipped recipe ({', '.join(recipe_names())})")


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides of the form `section.key=value`, whose values are parsed as YAML.

    Raises:
        ConfigError: unreadable, unknown keys, wrong values, contradictions.
    """
    try:
        data = yaml.safe_load(recipe_text(recipe)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe}: not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{recipe}: a recipe is a mapping of sections, not a {type(data).__name__}")
    return resolve_config(data, overrides)


def resolve_config(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a mapping of sections after applying the overrides.

    Raises:
        ConfigError: as `load_config`.
    """
    merged = dict(data)
    for override in overrides:
        path, value = _parse_override(override)
        merged = _set(merged, path, value)
    if isinstance(merged.get("task"), str):
        merged["task"] = task_from_text(merged["task"])
    for section in _SECTIONS_WITH_KIND:
        if isinstance(merged.get(section), Mapping):
            merged[section] = {"kind": RunConfig.model_fields[section].default.kind, **merged[section]}
    try:
        return RunConfig.model_validate(_with_absolute_paths(merged))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from error


_PATHS = (("model", "path"), ("task", "path"), ("task", "eval_path"), ("reward", "function"))


def _with_absolute_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """A run may be resumed from another folder; what names a file or folder here is kept with its whole path."""
    result = dict(data)
    for section, key in _PATHS:
        inner = result.get(section)
        value = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(value, str):
            path, colon, function = value.rpartition(":") if key == "function" else (value, "", "")
            local = Path(path).expanduser()
            if path and local.exists():
                result[section] = {**inner, key: f"{local.resolve()}{colon}{function}"}
    return result


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
            raise ConfigError(f"task: option {pair!r} has no value; write {pair}=...")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"task: {value!r} is not valid YAML: {_one_line(str(error))}") from error
    if head.startswith("reasoning-gym:"):
        return {"kind": "reasoning_gym", "dataset": head.partition(":")[2], "options": options}
    if head == "arithmetic":
        return {"kind": "arithmetic", **options}
    return {"kind": "dataset", "path": head, **options}


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, value = override.partition("=")
    if not equals or not path or not all(path.split(".")):
        raise ConfigError(f"{override}: not an override; write section.key=value")
    try:
        return path.split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {value!r} is not valid YAML: {_one_line(str(error))}") from error


def _set(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
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
    result[key] = _set(inner if isinstance(inner, Mapping) else {}, rest, value)
    return result


def _explain(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        path = ".".join(str(part) for part in _without_tags(fault["loc"]))
        if fault["type"] == "extra_forbidden":
            message = "unknown key; `ray-rl validate --json-schema` lists the known ones"
        elif fault["type"] == "missing":
            message = "is required"
        elif fault["type"] not in ("value_error", "union_tag_invalid"):
            message = f"{message} (got {fault['input']!r})"
        lines.extend(f"{path}: {line}" if path else line for line in message.splitlines())
    return lines


_SECTIONS_WITH_KIND = ("task", "reward", "segmentation", "values", "advantage", "weights")


def _without_tags(location: Sequence[int | str]) -> list[int | str]:
    """pydantic puts the `kind` of a discriminated union into the path; the user's file has no such level."""
    if len(location) > 1 and location[0] in _SECTIONS_WITH_KIND:
        return [location[0], *location[2:]]
    return list(location)


def _one_line(text: str) -> str:
    return " ".join(text.split())
