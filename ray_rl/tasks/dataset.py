"""Problems from rows of data: columns by dotted path, splits that do not overlap."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ray_rl.config.task import DatasetTaskConfig
from ray_rl.errors import ConfigError
from ray_rl.tasks import Split
from ray_rl.tasks.rows import read_rows
from ray_rl.types import Problem
from ray_rl.wording import printable, shown

Row = Mapping[str, Any]
PromptText = str | list[dict[str, str]]

logger = logging.getLogger(__name__)
_MISSING = object()
_MOST_PATHS = 20


class DatasetTask:
    """The rows of a data set as problems; evaluation rows whose prompt occurs in training are dropped and counted."""

    def __init__(self, config: DatasetTaskConfig) -> None:
        """Nothing is read before problems are asked for."""
        self._config = config

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in the order of the rows.

        Raises:
            ConfigError: no such data, column or marker; or no row is left.
        """
        return self._train if split == "train" else self._eval

    @cached_property
    def _train(self) -> tuple[Problem, ...]:
        rows = read_rows(self._config, "train")[: self._config.train_limit]
        if not rows:
            raise ConfigError(f"task.path: {self._config.path} has no training rows")
        return tuple(self._problems("train", rows))

    @cached_property
    def _eval(self) -> tuple[Problem, ...]:
        rows = read_rows(self._config, "eval")
        trained = {_key(problem) for problem in self._train}
        kept: list[Problem] = []
        dropped = 0
        for problem in self._problems("eval", rows):
            if _key(problem) in trained:
                dropped += 1
                continue
            kept.append(problem)
            if len(kept) == self._config.eval_limit:
                break
        if dropped:
            logger.warning("task: dropped %d evaluation rows whose prompt occurs in training", dropped)
        if not kept:
            raise ConfigError(
                f"task.eval_split: no evaluation row is left ({len(rows)} rows, {dropped} of them occur in training); "
                "name other rows with task.eval_path or task.eval_split"
            )
        return tuple(kept)

    def _problems(self, split: Split, rows: Sequence[Row]) -> Iterator[Problem]:
        config = self._config
        name = Path(config.path).stem
        for index, row in enumerate(rows):
            yield Problem(
                problem_id=f"{name}:{split}:{index}",
                prompt=_prompt(config, index, row),
                answer=_answer(config, index, row),
                metadata=_metadata(config, row),
            )


def lookup(row: Row, path: str) -> Any:
    """The value at a dotted path: ``lookup({"a": {"b": 1}}, "a.b") == 1``. A column of that very name goes first.

    Raises:
        KeyError: there is none.
    """
    if path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    inner = row.get(head, _MISSING)
    if not dot or not isinstance(inner, Mapping):
        raise KeyError(path)
    return lookup(inner, rest)


def column_paths(row: Row, prefix: str = "") -> Iterator[str]:
    """All dotted paths of a row, outer ones before what they contain."""
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from column_paths(value, f"{prefix}{name}.")


def _column(row: Row, index: int, field: str, path: str) -> Any:
    try:
        return lookup(row, path)
    except KeyError as error:
        has = ", ".join(map(printable, islice(column_paths(row), _MOST_PATHS))) or "nothing"
        raise ConfigError(f"task.{field}: row {index}: no column {shown(path)}; it has: {has}") from error


def _prompt(config: DatasetTaskConfig, index: int, row: Row) -> PromptText:
    value = _column(row, index, "prompt_column", config.prompt_column)
    if isinstance(value, str) and value:
        _check_text(index, value)
        return f"{config.prompt_prefix}{value}{config.prompt_suffix}"
    messages = _messages(value)
    if not messages:
        raise ConfigError(
            f"task.prompt_column: row {index}: column {config.prompt_column!r} must hold text or messages with role "
            f"and content, not {shown(value)}"
        )
    for message in messages:
        _check_text(index, message["content"])
    messages[-1]["content"] = f"{config.prompt_prefix}{messages[-1]['content']}{config.prompt_suffix}"
    return messages


def _messages(value: Any) -> list[dict[str, str]] | None:
    """Fresh copies of chat messages; None when the value is something else."""
    if not isinstance(value, list):
        return None
    messages: list[dict[str, str]] = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        role, content = entry.get("role"), entry.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return messages


def _answer(config: DatasetTaskConfig, index: int, row: Row) -> str:
    if config.answer_column is None:
        return ""
    value = _column(row, index, "answer_column", config.answer_column)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            f"task.answer_column: row {index}: column {config.answer_column!r} must hold text or a number, not "
            f"{shown(value)}; a verifier that reads the metadata needs none (answer_column: null)"
        )
    text = str(value)
    if config.answer_marker is None:
        return text
    _, found, answer = text.rpartition(config.answer_marker)
    if not found:
        raise ConfigError(f"task.answer_marker: row {index}: no {config.answer_marker!r} in the answer {shown(text)}")
    return answer.strip()


def _metadata(config: DatasetTaskConfig, row: Row) -> dict[str, Any]:
    """What the problem does not hold in full already."""
    held = {config.prompt_column}
    if config.answer_column is not None and config.answer_marker is None:
        held.add(config.answer_column)
    return {name: value for name, value in row.items() if name not in held}


def _key(problem: Problem) -> str:
    return problem.prompt if isinstance(problem.prompt, str) else json.dumps(problem.prompt)


def _check_text(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"task.prompt_column: row {index}: {shown(text)} holds half a character (a lone surrogate); mend the row"
        ) from error
