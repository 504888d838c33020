"""The verifiers: one completion in, one `Reward` out.

All functions here are synchronous and, `exact` excepted, may be slow, hang or raise; `actors.scoring` decides where
they run and for how long. To add one: a config variant in `ray_rl.config.reward`, a factory here, an entry in
`_VERIFIERS` and in `_ANSWERS`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

from actors.verdicts import shortened
from ray_rl.config.reward import (
    ExactRewardConfig,
    MathRewardConfig,
    PythonRewardConfig,
    ReasoningGymRewardConfig,
    RewardConfig,
)
from ray_rl.errors import ConfigError
from ray_rl.tasks.arithmetic import final_answer
from ray_rl.types import Reward, ScoringItem

Verifier = Callable[[ScoringItem], Reward]

_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?")
_FINAL_STOPS = re.compile(r"[\s.]+\Z")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_IN_MATH = ("$", r"\(", r"\[", r"\boxed")
_SCORE_ARGUMENTS = 4


class GradingFailed(Exception):
    """A verifier could not reach a verdict; the message is the reason that the record keeps."""


class RewardFunctionError(ConfigError):
    """`reward.function` cannot be used; the message says why and what to change."""


def make_verifier(config: RewardConfig) -> Verifier:
    """The verifier of a reward section. It returns a `Reward` with `failure` set where it reaches no verdict.

    Imports what the kind needs, which takes seconds for `math` and `reasoning_gym`. What a user's function raises
    passes through.

    Raises:
        RewardFunctionError: the function of a `python` reward cannot be used.
    """
    verdict = _VERIFIERS[config.kind](config)

    def verify(item: ScoringItem) -> Reward:
        try:
            return verdict(item)
        except GradingFailed as failure:
            return Reward(value=config.failure, failure=shortened(str(failure)))

    return verify


def final_answer_of(config: RewardConfig, text: str) -> str:
    """The final answer of a completion as majority votes compare it; empty when there is none.

    For `math` this runs sympy's parser on what a model wrote, which may take for ever: call it through
    `Scorer.final_answers`, which has a deadline, not in an event loop.
    """
    return _ANSWERS[config.kind](config, text)


# --- exact ---


def normalised(answer: str) -> str:
    """One spelling for equal answers: ``" $1,234.50. "`` -> ``"1234.5"``, ``"18.0"`` -> ``"18"``; text is trimmed."""
    text = _FINAL_STOPS.sub("", _THOUSANDS_SEPARATOR.sub("", answer.replace("$", "")).strip())
    number = _NUMBER.fullmatch(text)
    # Digits are compared as text: no rounding however many there are.
    if number is None or not (number[2] or number[3]):
        return text
    whole, fraction = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    magnitude = f"{whole}.{fraction}" if fraction else whole
    return f"-{magnitude}" if number[1] == "-" and magnitude != "0" else magnitude


def _exact(config: ExactRewardConfig) -> Verifier:
    def verdict(item: ScoringItem) -> Reward:
        expected = normalised(_reference(item))
        correct = float(_exact_answer(config, item.completion_text) == expected)
        return Reward(value=correct, parts={"exact": correct})

    return verdict


def _exact_answer(config: ExactRewardConfig, text: str) -> str:
    return normalised(final_answer(text, config.marker) or "")


def _reference(item: ScoringItem) -> str:
    if not item.problem.answer.strip():
        raise GradingFailed(f"no reference answer: problem {item.problem.problem_id}")
    return item.problem.answer


# --- math ---


def _math(config: MathRewardConfig) -> Verifier:
    from math_verify import verify

    # It warns, in every process, that its own alarms are off. They are, on purpose: they would turn a comparison that
    # never ends into a wrong answer. The process deadline names it a timeout, and reaches C code as well.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def verdict(item: ScoringItem) -> Reward:
        gold = _parsed_reference(_reference(item))
        if not gold:
            raise GradingFailed(f"unreadable reference answer: math-verify finds nothing in {item.problem.answer!r}")
        correct = float(verify(gold, _parsed(item.completion_text), timeout_seconds=None))
        return Reward(value=correct, parts={"math": correct})

    return verdict


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=None))


@lru_cache(maxsize=1024)
def _parsed_reference(answer: str) -> list[Any]:
    """All completions of a group share it. Bare LaTeX is only understood as mathematics between dollar signs."""
    return _parsed(answer if any(mark in answer for mark in _IN_MATH) else f"${answer}$")


def _math_answer(config: MathRewardConfig, text: str) -> str:
    parsed = _parsed(text)
    return str(parsed[0]) if parsed else ""


# --- reasoning_gym ---


def _reasoning_gym(config: ReasoningGymRewardConfig) -> Verifier:
    import reasoning_gym  # noqa: F401  (seconds; here, it doesn't count against the first item's deadline)

    def verdict(item: ScoringItem) -> Reward:
        metadata = item.problem.metadata
        missing = {"entry", "dataset"} - metadata.keys()
        if missing:
            raise GradingFailed(f"not a reasoning-gym problem: its metadata lacks {', '.join(sorted(missing))}")
        dataset = _generator(metadata["dataset"], json.dumps(dict(metadata.get("options", {})), sort_keys=True))
        score = dataset.score_answer(_tagged_answer(config, item.completion_text), metadata["entry"])
        value = _finite(score, "the score")
        return Reward(value=value, parts={"reasoning_gym": value})

    return verdict


@lru_cache(maxsize=64)
def _generator(name: str, options: str) -> Any:
    """The generator that scores, not the one that made the problem: of its configuration only `options` matters."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **{**json.loads(options), "size": 1})


def _tagged_answer(config: ReasoningGymRewardConfig, text: str) -> str:
    if config.answer_tag is not None:
        _, opening, after = text.rpartition(f"<{config.answer_tag}>")
        content, closing, _ = after.partition(f"</{config.answer_tag}>")
        if opening and closing:
            return content.strip()
    return text.strip()


# --- python ---


def check_python_function(function: str) -> None:
    """Whether ``path/to/file.py:function_name`` names a usable function, without running any of the file.

    Raises:
        RewardFunctionError: the file is missing or not Python, or it has no such function of four positional arguments.
    """
    path, name = _located(function)
    try:
        module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except OSError as error:
        raise RewardFunctionError(f"reward.function: {path} cannot be read: {error.strerror}") from error
    # Null bytes are a ValueError, as what is no UTF-8 is; what is nested too deeply exhausts the parser.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RewardFunctionError(f"reward.function: {path} is not Python: {error}") from error
    definitions = [node for node in module.body if name in _bound_names(node)]
    if not definitions:
        raise RewardFunctionError(f"reward.function: {path} defines no {name!r} at its top level")
    match definitions[-1]:
        case ast.AsyncFunctionDef():
            raise RewardFunctionError(f"reward.function: {name} in {path} is async; it must be a plain function")
        case ast.FunctionDef(args=arguments) if not _takes_score_arguments(arguments):
            raise RewardFunctionError(
                f"reward.function: {name} in {path} must take the {_SCORE_ARGUMENTS} positional arguments "
                "(prompt, completion, answer, metadata)"
            )


def _located(function: str) -> tuple[Path, str]:
    """File and name. Relative to the working directory or, on another node, to wherever the job's code was unpacked."""
    file, _, name = function.rpartition(":")
    for path in (os.path.expanduser(file), *(os.path.join(folder, file) for folder in sys.path)):
        if os.path.isfile(path):  # False also where a path is none
            return Path(path).resolve(), name
    raise RewardFunctionError(f"reward.function: no file {file} in {Path.cwd()} nor on the import path")


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a top-level statement may define, also within `if` and `try`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(inner.name)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in inner.names)
    return names


def _takes_score_arguments(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    enough = positional >= _SCORE_ARGUMENTS or arguments.vararg is not None
    demanded_by_name = any(default is None for default in arguments.kw_defaults)
    return enough and positional - len(arguments.defaults) <= _SCORE_ARGUMENTS and not demanded_by_name


def _python(config: PythonRewardConfig) -> Verifier:
    score = _loaded(config.function)

    def verdict(item: ScoringItem) -> Reward:
        problem = item.problem
        return _as_reward(score(problem.prompt, item.completion_text, problem.answer, dict(problem.metadata)))

    return verdict


def _loaded(function: str) -> Callable[..., object]:
    path, name = _located(function)
    # Like a script: the file may import its neighbours.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RewardFunctionError(f"reward.function: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    loaded = getattr(module, name, None)
    if not callable(loaded):
        raise RewardFunctionError(f"reward.function: {name} in {path} is {loaded!r}, not a function")
    return loaded  # type: ignore[no-any-return]


def _as_reward(result: object) -> Reward:
    if not isinstance(result, Mapping):
        return Reward(value=_finite(result, "the function's result"))
    if not result:
        raise GradingFailed("not a reward: the function returned an empty dict")
    parts = {str(name): _finite(value, f"part {str(name)!r}") for name, value in result.items()}
    value = parts.pop("reward", None)
    return Reward(value=_sum(parts.values()) if value is None else value, parts=parts)


def _sum(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        raise GradingFailed("not a finite number: the sum of the parts is too large") from None


def _finite(value: object, what: str) -> float:
    """A plain float. Numbers of numpy count as such, its arrays and tensors of torch do not: they may hold many."""
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        value = bool(value)
    if not isinstance(value, Real):
        raise GradingFailed(f"not a number: {what} is of type {_type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise GradingFailed(f"not a finite number: {what} is too large") from None
    if not math.isfinite(number):
        raise GradingFailed(f"not a finite number: {what} is {number}")
    return number


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


_VERIFIERS: dict[str, Callable[[Any], Verifier]] = {
    "exact": _exact,
    "math": _math,
    "reasoning_gym": _reasoning_gym,
    "python": _python,
}
_ANSWERS: dict[str, Callable[[Any, str], str]] = {
    "exact": _exact_answer,
    "math": _math_answer,
    "reasoning_gym": _tagged_answer,
    "python": lambda config, text: text.strip(),
}
