"""The built-in task: chains of arithmetic modulo 10, with an exact verifier and demonstrations of mixed quality.

A prompt is an expression that is worked from left to right, every intermediate value modulo 10. A solution is one step
per line and the final answer after a marker::

    prompt       3+4*7-2:
    completion   3+4=7
                 7*7=9
                 9-2=7
                 #7

Whoever learns from the demonstrations knows the facts (260 of them: a value, an operator, an operand) but also picks up
bad habits: at each step the careful form above or, more often, a slip that shows in the sign that stands for "=" and
that is systematically wrong. One slip spoils the chain, so the step at which it happens is pivotal.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

from ray_rl.tasks.lazy import LazyProblems
from ray_rl.types import Problem

Split = Literal["train", "eval"]

ANSWER_MARKER = "#"
"""Precedes the final answer in every demonstration."""
EVAL_ONE_IN = 8
"""One in so many of all expressions belongs to the evaluation split, whatever the seed."""
DEFAULT_SLIP_SHARE = 0.55
"""Slips per step in demonstrations: enough that the main slip is likelier than the careful form."""
MAIN_SLIP_SHARE = 0.9
"""Of the slips of an operator, the share that is its first kind."""

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
    "*": lambda a, b: (a * b) % 10,
}
# An operand that changes nothing (+0, *1) or wipes out what came before (*0) makes no step.
_SMALLEST_OPERAND = {"+": 1, "-": 1, "*": 2}
_OPERANDS_PER_STEP = sum(10 - smallest for smallest in _SMALLEST_OPERAND.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Slip:
    """One kind of sloppy step."""

    operator: str
    """The operator at which it happens: ``+``, ``-`` or ``*``."""
    sign: str
    """Stands where the careful form has ``=``; each kind has its own."""
    name: str
    result: Callable[[int, int], int]
    """(value, operand) -> the digit written after the sign; right only by chance."""


SLIPS: tuple[Slip, ...] = (
    Slip(operator="+", sign="!", name="carry added to the units", result=lambda a, b: (a + b) // 10 + (a + b) % 10),
    Slip(operator="+", sign="^", name="counted one too far", result=lambda a, b: (a + b + 1) % 10),
    Slip(operator="-", sign="_", name="difference read as a sum", result=lambda a, b: (a + b) % 10),
    Slip(operator="-", sign="~", name="difference turned round", result=lambda a, b: (b - a) % 10),
    Slip(operator="*", sign="?", name="product read as a sum", result=lambda a, b: (a + b) % 10),
    Slip(operator="*", sign="&", name="one addend too many", result=lambda a, b: (a * b + a) % 10),
)
"""All kinds of slips; the first of each operator is its main one."""

ALPHABET = "0123456789" + "".join(_OPERATORS) + ":\n=" + ANSWER_MARKER + "".join(slip.sign for slip in SLIPS)
"""Every character that prompts, demonstrations and answers can contain."""

_SLIPS_OF = {operator: [slip for slip in SLIPS if slip.operator == operator] for operator in _OPERATORS}
_EXPRESSION = re.compile(r"[0-9](?:[-+*][0-9])+")


def split_of(expression: str) -> Split:
    """The split of an expression: decided by its hash alone, so the two sets cannot meet under any seed or size."""
    digest = blake2b(expression.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_ONE_IN == 0 else "train"


def parse(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """Take an expression apart: ``"3+4*7"`` -> ``(3, [("+", 4), ("*", 7)])``.

    Raises:
        ValueError: the text is not digits joined by ``+``, ``-`` or ``*``.
    """
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"not a chain of one-digit steps: {expression!r}")
    steps = [(expression[i], int(expression[i + 1])) for i in range(1, len(expression), 2)]
    return int(expression[0]), steps


def evaluate(expression: str) -> int:
    """The value from left to right, modulo 10: ``"3+4*7-2"`` -> 7. Raises ValueError as `parse` does."""
    value, steps = parse(expression)
    for operator, operand in steps:
        value = _OPERATORS[operator](value, operand)
    return value


def final_answer(text: str, marker: str = ANSWER_MARKER) -> str | None:
    """What stands between the last marker and the end of its line, stripped; None if there is no marker or nothing."""
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    # "\n" is the task's only line end; str.splitlines would also cut at form feeds and the like.
    return rest.partition("\n")[0].strip() or None


def verify(completion_text: str, answer: str, marker: str = ANSWER_MARKER) -> float:
    """1.0 if the final answer of the completion equals `answer` exactly, else 0.0."""
    return float(final_answer(completion_text, marker) == answer)


def demonstration(problem: Problem, rng: random.Random, slip_share: float = DEFAULT_SLIP_SHARE) -> str:
    """A worked solution of `problem` (no end-of-sequence mark) in which each step slips with probability `slip_share`.

    Later steps go on from the wrong value, and the final answer is the last value reached. With ``slip_share=0`` the
    solution is careful throughout and always verifies.

    Raises:
        ValueError: the problem is not one of this task, or `slip_share` is not in [0, 1].
    """
    if not 0 <= slip_share <= 1:
        raise ValueError(f"slip_share must lie in [0, 1], got {slip_share}")
    if not isinstance(problem.prompt, str):
        raise ValueError(f"not a problem of the arithmetic task: {problem.problem_id}")
    value, steps = parse(problem.prompt.removesuffix(":\n"))
    lines = []
    for operator, operand in steps:
        sign, result = "=", _OPERATORS[operator]
        if rng.random() < slip_share:
            main, *others = _SLIPS_OF[operator]
            slip = main if rng.random() < MAIN_SLIP_SHARE else rng.choice(others)
            sign, result = slip.sign, slip.result
        following = result(value, operand)
        lines.append(f"{value}{operator}{operand}{sign}{following}\n")
        value = following
    return "".join(lines) + f"{ANSWER_MARKER}{value}"


def make_problem(expression: str, problem_id: str) -> Problem:
    """The row of an expression: prompt ``"<expression>:\\n"``, its answer, and the number of steps as metadata."""
    steps = len(expression) // 2
    return Problem(
        problem_id=problem_id, prompt=f"{expression}:\n", answer=str(evaluate(expression)), metadata={"steps": steps}
    )


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """A seeded source of problems; its difficulty is the number of steps.

    Example: ``ArithmeticTask(min_steps=2, max_steps=2).problems("train")[0].prompt`` is something like ``"3+4*7:\\n"``.
    """

    min_steps: int = 4
    """Fewest steps of a chain, at least 1."""
    max_steps: int = 7
    """Most steps of a chain; lengths are drawn uniformly."""
    train_size: int = 20_000
    """Training problems in an epoch; short chains repeat once there are fewer expressions than that."""
    eval_size: int = 512
    """Evaluation problems, all different."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be served: ValueError."""
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"need 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        if self.train_size < 1 or self.eval_size < 1:
            raise ValueError(f"sizes must be positive, got {self.train_size} and {self.eval_size}")
        expressions = sum(10 * _OPERANDS_PER_STEP**n for n in range(self.min_steps, self.max_steps + 1))
        # Half of the expected share: drawing distinct ones stays quick, and the hash may fall unevenly on few.
        available = expressions // (2 * EVAL_ONE_IN)
        if self.eval_size > available:
            raise ValueError(
                f"eval_size={self.eval_size} is more than the {available} different problems that chains of "
                f"{self.min_steps} to {self.max_steps} steps can give; lower it or raise max_steps"
            )

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, made when asked for; item i depends only on seed, lengths, split and i."""
        if split == "train":
            return LazyProblems(self.train_size, self._train_problem)
        return LazyProblems(self.eval_size, lambda i: make_problem(self._eval_expressions[i], f"arithmetic:eval:{i}"))

    def _train_problem(self, index: int) -> Problem:
        """Drawn by a generator of its own: any of a million costs the same."""
        rng = random.Random(f"arithmetic:train:{self.seed}:{index}")
        return make_problem(self.draw(rng, "train"), f"arithmetic:train:{index}")

    @cached_property
    def _eval_expressions(self) -> list[str]:
        """Drawn in one go on first use: that they differ from one another cannot be known one by one."""
        rng = random.Random(f"arithmetic:eval:{self.seed}")
        distinct: dict[str, None] = {}
        while len(distinct) < self.eval_size:
            distinct.setdefault(self.draw(rng, "eval"))
        return list(distinct)

    def draw(self, rng: random.Random, split: Split) -> str:
        """A random expression of the split."""
        while True:
            steps = rng.randint(self.min_steps, self.max_steps)
            expression = str(rng.randint(0, 9))
            for operator in rng.choices(tuple(_OPERATORS), k=steps):
                expression += f"{operator}{rng.randint(_SMALLEST_OPERAND[operator], 9)}"
            if split_of(expression) == split:
                return expression
