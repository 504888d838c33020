"""Where problems come from: a task is its problems, in a training and an evaluation split that never meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from ray_rl.config.task import ArithmeticTaskConfig, DatasetTaskConfig, ReasoningGymTaskConfig, TaskConfig
from ray_rl.errors import ConfigError
from ray_rl.types import Problem

Split = Literal["train", "eval"]


class Task(Protocol):
    """A source of problems."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split in a fixed order; no prompt of one split occurs in the other.

        Raises:
            ConfigError: the data is not what the configuration says.
        """


def make_task(config: TaskConfig) -> Task:
    """The task that a configuration section describes. Problems are made or read when asked for.

    Raises:
        ConfigError: no such data or generator, or sizes that it cannot serve.
    """
    return _FACTORIES[config.kind](config)


def _arithmetic(config: ArithmeticTaskConfig) -> Task:
    from ray_rl.tasks.arithmetic import ArithmeticTask

    try:
        return ArithmeticTask(**config.model_dump(exclude={"kind"}))
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error


def _reasoning_gym(config: ReasoningGymTaskConfig) -> Task:
    from ray_rl.tasks.reasoning_gym import ReasoningGymTask

    return ReasoningGymTask(config)


def _dataset(config: DatasetTaskConfig) -> Task:
    from ray_rl.tasks.dataset import DatasetTask

    return DatasetTask(config)


_FACTORIES: dict[str, Callable[[Any], Task]] = {
    "arithmetic": _arithmetic,
    "reasoning_gym": _reasoning_gym,
    "dataset": _dataset,
}
