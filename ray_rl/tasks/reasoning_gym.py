"""Problems from a generator of the reasoning-gym package.

Some generators need 30 ms a problem, so nothing is generated before it is asked for, and the splits are kept apart
without comparing them: the hash of a question alone says which split it belongs to, whatever the seeds and sizes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

from ray_rl.config.task import ReasoningGymTaskConfig
from ray_rl.errors import ConfigError
from ray_rl.tasks import Split
from ray_rl.tasks.lazy import LazyProblems
from ray_rl.types import Problem
from ray_rl.wording import one_line, shown

EVAL_ONE_IN = 4
"""One in so many of all questions belongs to the evaluation split: few to lose, and found in a few draws."""
_MOST_ATTEMPTS = 64
"""Draws for one training problem before the generator is taken to have no training questions."""

_GENERATOR_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What generators raise for options that they don't expect; some look at them only when they make a problem."""

logger = logging.getLogger(__name__)


def split_of(question: str) -> Split:
    """The split that a question belongs to."""
    digest = blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_ONE_IN == 0 else "train"


class ReasoningGymTask:
    """A generator's problems; each carries in its metadata what rebuilds the scorer.

    ``metadata = {"entry": {"question", "answer", "metadata"}, "dataset": name, "options": {...}}``
    """

    def __init__(self, config: ReasoningGymTaskConfig) -> None:
        """Check that the generator exists and takes its options; nothing is generated.

        Raises:
            ConfigError: it does not, or reasoning-gym is not installed.
        """
        for key in {"seed", "size"} & set(config.options):
            known = "task.seed" if key == "seed" else "task.train_size and task.eval_size"
            raise ConfigError(f"task.options.{key}: is set by {known}; leave it out")
        self._config = config
        self._sources: dict[tuple[Split, int], Any] = {}
        self._source("train", 0)

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split. Training problems are made one by one; held-out ones together, all different.

        A generator with few questions gives fewer held-out problems than asked for (logged).

        Raises:
            ConfigError: the generator has no question for the split.
        """
        return LazyProblems(self._config.train_size, self.train_problem) if split == "train" else self._eval_problems

    def train_problem(self, index: int) -> Problem:
        """Training problem `index` (0 to train_size - 1); depends on the configuration and the index only.

        Raises:
            ConfigError: the generator has too few questions.
        """
        for attempt in range(_MOST_ATTEMPTS):
            entry = self._entry("train", attempt, index)
            if split_of(entry["question"]) == "train":
                return self._problem(f"{self._config.dataset}:train:{index}", entry)
        raise self._too_few("train")

    @cached_property
    def _eval_problems(self) -> tuple[Problem, ...]:
        found: dict[str, Problem] = {}
        wanted, attempt, barren = self._config.eval_size, 0, 0
        # So many draws in a row without a new question mean that there are none left.
        patience = wanted + _MOST_ATTEMPTS
        while len(found) < wanted and barren < patience:
            index = attempt % wanted
            entry = self._entry("eval", attempt // wanted, index)
            attempt += 1
            question = entry["question"]
            if question in found or split_of(question) != "eval":
                barren += 1
                continue
            barren = 0
            found[question] = self._problem(f"{self._config.dataset}:eval:{len(found)}", entry)
        if not found:
            raise self._too_few("eval")
        if len(found) < wanted:
            logger.warning(
                "task.eval_size: %s has only %d held-out questions, not %d", self._config.dataset, len(found), wanted
            )
        return tuple(found.values())

    def _too_few(self, split: Split) -> ConfigError:
        return ConfigError(
            f"task.options: {self._config.dataset} with {self._config.options} has too few different questions to "
            f"hold some out (none for {split}); make it harder"
        )

    def _problem(self, problem_id: str, entry: Mapping[str, Any]) -> Problem:
        config = self._config
        return Problem(
            problem_id=problem_id,
            prompt=config.prompt_prefix + entry["question"] + config.prompt_suffix,
            answer=str(entry["answer"]),
            metadata={"entry": dict(entry), "dataset": config.dataset, "options": dict(config.options)},
        )

    def _entry(self, split: Split, attempt: int, index: int) -> Mapping[str, Any]:
        try:
            entry: Mapping[str, Any] = self._source(split, attempt)[index]
        except _GENERATOR_ERRORS as error:
            raise _refused(self._config.dataset, self._config.options, error) from error
        return entry

    def _source(self, split: Split, attempt: int) -> Any:
        """A generator with a seed of its own. reasoning-gym adds the index to the seed, so near seeds would overlap."""
        if (split, attempt) not in self._sources:
            config = self._config
            seed = random.Random(f"{config.seed}:{split}:{attempt}").getrandbits(31)
            size = config.train_size if split == "train" else config.eval_size
            self._sources[split, attempt] = _create(config.dataset, config.options, seed=seed, size=size)
        return self._sources[split, attempt]


def _create(name: str, options: Mapping[str, Any], *, seed: int, size: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("task.kind: reasoning_gym needs the package; pip install reasoning-gym") from error
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = ", ".join(sorted(known for known in DATASETS if known[:3] == name[:3])) or ", ".join(
            sorted(DATASETS)[:8]
        )
        raise ConfigError(f"task.dataset: reasoning-gym has no {shown(name)}; it has for instance {close}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except _GENERATOR_ERRORS as error:
        raise _refused(name, options, error) from error


def _refused(name: str, options: Mapping[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"task.options: {name} does not take {shown(dict(options))}: {one_line(error)}")
