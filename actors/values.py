"""Which states get how many continuations, and what their rewards say about the states (pure decisions)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_rl.config.values import FixedValues, NoValues, ValuesConfig
from ray_rl.types import Reward, StateValue


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A point inside a group's completions from which continuations may start."""

    trajectory: int
    """The first trajectory of the group that passes through it."""
    boundary: int
    """Tokens of that trajectory before the state; 0 = the prompt."""
    prefix: tuple[int, ...]
    """[boundary] those tokens. Equal prefixes are one state."""


def distinct_states(
    completions: Sequence[Sequence[int]], boundaries: Sequence[Sequence[int]]
) -> tuple[list[State], list[list[int]]]:
    """The states at which the segments of a group start, equal ones once.

    Args:
        completions: [G] token ids.
        boundaries: [G] 0 = b_0 < ... < b_n = T of each completion.

    Returns:
        The states, and for each completion [n] the index of the state at which each of its segments starts.
    """
    states: list[State] = []
    index: dict[tuple[int, ...], int] = {}
    starts: list[list[int]] = []
    for trajectory, (tokens, cuts) in enumerate(zip(completions, boundaries, strict=True)):
        own: list[int] = []
        for boundary in cuts[:-1]:
            prefix = tuple(tokens[:boundary])
            if prefix not in index:
                index[prefix] = len(states)
                states.append(State(trajectory=trajectory, boundary=boundary, prefix=prefix))
            own.append(index[prefix])
        starts.append(own)
    return states, starts


def fixed_continuations(config: FixedValues, states: Sequence[State]) -> list[int]:
    """K for every state (VinePPO, arXiv 2410.01679, section 4). Unbiased; variance p(1-p)/K for rewards in {0, 1}."""
    return [config.num_continuations] * len(states)


def no_continuations(config: NoValues, states: Sequence[State]) -> list[int]:
    """None for any state."""
    return [0] * len(states)


ESTIMATORS: dict[str, Callable[..., list[int]]] = {"fixed": fixed_continuations, "none": no_continuations}


def continuation_counts(config: ValuesConfig, states: Sequence[State]) -> list[int]:
    """How many continuations start from each state."""
    return ESTIMATORS[config.kind](config, states)


def state_value(boundary: int, rewards: Sequence[Reward]) -> StateValue:
    """Mean of the rewards whose grading did not fail, with the standard error of that mean (sample form).

    With no such reward the mean is nan and the count 0: the value is unknown.
    """
    values = [reward.value for reward in rewards if reward.failure is None]
    count = len(values)
    if count == 0:
        return StateValue(boundary=boundary, mean=math.nan, stderr=math.inf, count=0)
    mean = math.fsum(values) / count
    if count == 1:
        return StateValue(boundary=boundary, mean=mean, stderr=math.inf, count=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return StateValue(boundary=boundary, mean=mean, stderr=math.sqrt(variance / count), count=count)
