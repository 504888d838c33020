"""The yardstick of a prompt: the values of its states from many continuations of their own."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from actors.state_tree import ROOT, State, StateTree
from ray_rl.types import Trajectory

Draw = Callable[[State, int], Awaitable[Sequence[tuple[Sequence[int], float]]]]
"""n continuations of a state: the tokens and the reward of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over independent samples, and the variance of that mean as the samples tell it."""

    mean: float
    variance: float


class Reference:
    """Values of all states of some completions, from at least `samples` rewards each.

    A continuation counts for every state that it passes through, so a state draws only what earlier states left lacking.
    How many a state has got depends on tokens alone, never on rewards: the values are unbiased.
    """

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        """The states between the segments of these completions of one prompt."""
        self._tree = StateTree(len(trajectories))
        self._rewards: list[float] = []
        self._of_state: defaultdict[int, list[int]] = defaultdict(list)
        for index, trajectory in enumerate(trajectories):
            completion = trajectory.completion
            self._tree.add(index, completion.token_ids, completion.behavior_logprobs, trajectory.boundaries)

    async def fill(self, samples: int, draw: Draw) -> int:
        """Draw until every state has so many; earlier states first, for they help later ones. Returns the tokens drawn."""
        tokens = 0
        for index, state in sorted(enumerate(self._tree.states), key=lambda pair: pair[1].boundary):
            lacking = samples - len(self._of_state[index])
            for token_ids, reward in await draw(state, lacking) if lacking > 0 else ():
                tokens += len(token_ids)
                self._rewards.append(reward)
                for passed in self._tree.passed(index, token_ids):
                    self._of_state[passed].append(len(self._rewards) - 1)
        return tokens

    @property
    def states(self) -> int:
        """Distinct states."""
        return len(self._tree.states)

    @property
    def undecided(self) -> bool:
        """Whether both kinds of outcome were seen from the prompt."""
        rewards = [self._rewards[sample] for sample in self._of_state[ROOT]]
        return min(rewards) < max(rewards)

    def values(self, trajectory: int) -> list[Estimate]:
        """[n] of the states at which the segments of a completion start."""
        return [self._estimate({state: 1.0}) for state in self._tree.path(trajectory)]

    def advantages(self, trajectory: int, reward: float) -> list[Estimate]:
        """[n] V(s_{k+1}) - V(s_k) of each segment of a completion; the last one's is R - V(s_{n-1})."""
        path = self._tree.path(trajectory)
        changes = [self._estimate({after: 1.0, before: -1.0}) for before, after in itertools.pairwise(path)]
        last = self._estimate({path[-1]: -1.0})
        return [*changes, Estimate(mean=reward + last.mean, variance=last.variance)]

    def _estimate(self, combination: dict[int, float]) -> Estimate:
        """A sum of values; a sample that speaks for several of them enters the variance once, with its whole weight."""
        mean, deviations = 0.0, defaultdict[int, float](float)
        for state, sign in combination.items():
            samples = self._of_state[state]
            value = math.fsum(self._rewards[sample] for sample in samples) / len(samples)
            mean += sign * value
            # n - 1, so that the square of a mean's deviation is expected to be its variance.
            scale = sign / math.sqrt(len(samples) * (len(samples) - 1))
            for sample in samples:
                deviations[sample] += scale * (self._rewards[sample] - value)
        return Estimate(mean=mean, variance=math.fsum(deviation**2 for deviation in deviations.values()))
