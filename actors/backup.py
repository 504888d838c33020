"""Values backed up over the prefix tree: the policy's own probabilities say how often a completion would be followed.

Take a completion that ends with reward R and passes through the states s_0 .. s_{n-1}. From s_k the policy takes its next
segment again with the probability P_k that sampled it, and takes another way with 1 - P_k:

    V(s_k) = P_k V(s_{k+1}) + (1 - P_k) U_k,    V(s_n) = R

P_k is known exactly, so only U_k has to be estimated, by the samples of s_k that leave the completion there. Of N samples
of s_k (continuations, and what passes through; the completion itself is none), let x be the mean of those that leave:

    V^(s_k) = V^(s_{k+1}) + w (x - V^(s_{k+1})),    w = (1 - P_k) / (1 - P_k^N), and 0 if none leaves

Some leave with probability 1 - P_k^N, which the weight undoes: E[V^(s_k)] = V(s_k), whatever P_k and N (derived here; N may
depend on what led to the state, but neither on rewards nor on how its samples go on from there). Where segments are long,
P_k is about 0 and this is the plain mean of the samples; where the policy is sharp, and where prefixes coincide, little is
left to chance. A sample that leaves into another state of the tree counts with that state's value, for which more samples
speak (Rao-Blackwell).

The completion's own reward enters with its exact probability, as a part of the tree and not as a sample: the values of its
states do not lean to its outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.evidence import Evidence, Sample, sample_variance, state_value
from actors.state_tree import StateTree
from ray_rl.types import StateValue


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ahead:
    """What follows a state on a completion: the next state whose value is known, or the completion's end."""

    mean: float
    variance: float
    count: int
    state: int | None
    """None: the end."""


class Backup:
    """Values of the states on a group's completions, by the evidence there is when it is made."""

    def __init__(self, tree: StateTree, evidence: Evidence, *, certain: float = 0.0) -> None:
        """Of one group.

        Args:
            tree: with all completions.
            evidence: their rewards and the continuations.
            certain: a state without any sample is known nevertheless if the policy leaves the completion there with at most
                this probability; its value is then wrong by at most as much, in units of the reward's range.
        """
        self._tree = tree
        self._evidence = evidence
        self._certain = certain
        self._means: dict[int, float] = {}

    def values(self, trajectory: int, boundaries: Sequence[int]) -> list[StateValue]:
        """Of a completion's first states.

        Args:
            trajectory: index in the group.
            boundaries: of these states, from the prompt's 0; what comes after them is worth the completion's own reward.
        """
        path, logprobs = self._tree.path(trajectory), self._tree.segment_logprobs(trajectory)
        outcome, end = self._evidence.outcome(trajectory), len(boundaries)
        ahead = None
        if outcome is not None:
            state = path[end] if end < len(path) else None
            ahead = _Ahead(mean=outcome, variance=0.0, count=1, state=state)
        reach, found = 0.0, []
        for index in range(end - 1, -1, -1):
            reach += logprobs[index]
            value = self._value(trajectory, path[index], boundaries[index], ahead, reach)
            found.append(value)
            if value.count:
                ahead = _Ahead(mean=value.mean, variance=value.stderr**2, count=value.count, state=path[index])
                reach = 0.0
        return found[::-1]

    def _value(self, trajectory: int, state: int, boundary: int, ahead: _Ahead | None, reach: float) -> StateValue:
        """Of one state on a completion; `reach` is the log-probability of getting from there to what is known ahead."""
        samples = self._evidence.samples_of(state, without=trajectory)
        if ahead is None:
            return state_value(boundary, [self._worth(sample, state) for sample in samples])
        leaves = -math.expm1(min(reach, 0.0))
        count = len(samples) or (ahead.count if leaves <= self._certain else 0)
        if not count:
            return state_value(boundary, [])
        leaving = [
            self._worth(sample, state) for sample in samples if not self._follows(sample, trajectory, ahead.state)
        ]
        mean = ahead.mean
        if leaving:
            weight = leaves / -math.expm1(len(samples) * reach) if leaves else 1 / len(samples)
            mean += weight * (math.fsum(leaving) / len(leaving) - ahead.mean)
        spread = sample_variance(leaving if len(leaving) > 1 else [sample.reward for sample in samples])
        variance = (1 - leaves) ** 2 * ahead.variance + (leaves**2 * spread / max(len(leaving), 1) if leaves else 0.0)
        return StateValue(boundary=boundary, mean=mean, stderr=math.sqrt(variance), count=count)

    def _follows(self, sample: Sample, trajectory: int, state: int | None) -> bool:
        """Whether a sample goes the completion's way to a state of it, or to its end."""
        if state is not None:
            return state in sample.path
        return sample.path[-1] == self._tree.path(trajectory)[-1] and sample.tail == self._tree.tail(trajectory)

    def _worth(self, sample: Sample, state: int) -> float:
        """Of what a sample does after a state: the value of the state that it reaches next, else its reward."""
        after = sample.after(state)
        return sample.reward if after is None else self._mean(after)

    def _mean(self, state: int) -> float:
        """Value of a state beside the completion, over all its samples."""
        if state not in self._means:
            samples = self._evidence.samples_of(state)
            self._means[state] = math.fsum(self._worth(sample, state) for sample in samples) / len(samples)
        return self._means[state]
