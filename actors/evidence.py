"""What is known of the values of a group's states: the rewards that speak for each (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.state_tree import StateTree
from ray_rl.types import Reward, StateValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A graded completion or continuation."""

    reward: float
    path: tuple[int, ...]
    """The states it passes through, the one it starts from first."""
    tail: tuple[int, ...]
    """Its tokens after the last of them."""
    trajectory: int | None
    """The completion that it is; None for a continuation."""

    def after(self, state: int) -> int | None:
        """The state that it passes through next after one of its states; None if it ends before another."""
        following = self.path.index(state) + 1
        return self.path[following] if following < len(self.path) else None


class Evidence:
    """Samples of each state's value, each once: continuations that start there, and whatever passes through.

    A completion or continuation that passes through a state goes on from there as the policy would from that state, so its
    reward is a sample of the state's value. A failed grading is no sample.
    """

    def __init__(self, tree: StateTree) -> None:
        """Of the states of a tree, also those that it will get."""
        self._tree = tree
        self.samples: list[Sample] = []
        """All samples of the group, in the order in which they came."""
        self._started: dict[int, list[int]] = {}
        self._passing: dict[int, list[int]] = {}
        self._trajectory: dict[int, int] = {}

    def add_trajectory(self, trajectory: int, reward: Reward) -> None:
        """A completion of the group, which is in the tree already."""
        if reward.failure is None:
            self._trajectory[trajectory] = len(self.samples)
            for state in self._tree.path(trajectory):
                self._passing.setdefault(state, []).append(len(self.samples))
            path, tail = tuple(self._tree.path(trajectory)), self._tree.tail(trajectory)
            self.samples.append(Sample(reward=reward.value, path=path, tail=tail, trajectory=trajectory))

    def add_continuation(self, state: int, token_ids: Sequence[int], reward: Reward) -> None:
        """A continuation of a state."""
        if reward.failure is None:
            path = tuple(self._tree.passed(state, token_ids))
            self._started.setdefault(state, []).append(len(self.samples))
            for passed in path[1:]:
                self._passing.setdefault(passed, []).append(len(self.samples))
            passed_tokens = self._tree.states[path[-1]].boundary - self._tree.states[state].boundary
            tail = tuple(token_ids[passed_tokens:])
            self.samples.append(Sample(reward=reward.value, path=path, tail=tail, trajectory=None))

    def samples_of(self, state: int, *, without: int | None = None) -> list[Sample]:
        """What speaks for a state: what starts there and what passes through; all but one completion's own."""
        own = self._own(without)
        return [self.samples[sample] for sample in self._samples(state, pool=True) if sample != own]

    def of(self, state: int, *, pool: bool = True, without: int | None = None) -> list[float]:
        """The rewards that speak for a state.

        Args:
            state: index in the tree.
            pool: also what passes through, not only what starts there.
            without: a completion that is left out, since its own reward says nothing about where it came from.
        """
        own = self._own(without)
        return [self.samples[sample].reward for sample in self._samples(state, pool) if sample != own]

    def of_neighbours(self, state: int) -> list[float]:
        """The rewards that speak for the states next to a state, without those that speak for itself."""
        parent = self._tree.states[state].parent
        near = [*self._tree.children(state), *([parent] if parent >= 0 else [])]
        samples = {sample for neighbour in near for sample in self._samples(neighbour, pool=True)}
        others = sorted(samples.difference(self._samples(state, pool=True)))
        return [self.samples[sample].reward for sample in others]

    def outcome(self, trajectory: int) -> float | None:
        """The reward of a completion; None if it could not be graded."""
        sample = self._trajectory.get(trajectory)
        return None if sample is None else self.samples[sample].reward

    def baseline(self, state: int, reward: Reward, *, pool: bool) -> float:
        """A state's value without one continuation that started there; nan where nothing else speaks for it."""
        rewards = self.of(state, pool=pool)
        others = len(rewards) - 1
        if reward.failure is not None or others < 1:
            return math.nan
        return (math.fsum(rewards) - reward.value) / others

    def _samples(self, state: int, pool: bool) -> list[int]:
        return [*self._started.get(state, ()), *(self._passing.get(state, ()) if pool else ())]

    def _own(self, trajectory: int | None) -> int | None:
        return None if trajectory is None else self._trajectory.get(trajectory)


def state_value(boundary: int, rewards: Sequence[float]) -> StateValue:
    """Mean of the rewards, with the standard error of that mean (sample form).

    With no reward the mean is nan and the count 0: the value is unknown.
    """
    count = len(rewards)
    if count == 0:
        return StateValue(boundary=boundary, mean=math.nan, stderr=math.inf, count=0)
    mean = math.fsum(rewards) / count
    return StateValue(boundary=boundary, mean=mean, stderr=math.sqrt(sample_variance(rewards) / count), count=count)


def sample_variance(rewards: Sequence[float]) -> float:
    """Unbiased variance; infinite with fewer than two rewards."""
    if len(rewards) < 2:
        return math.inf
    mean = math.fsum(rewards) / len(rewards)
    return math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
