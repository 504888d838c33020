"""The states between the segments of a group's completions, as a tree of prefixes (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

ROOT = 0
"""The state of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A point inside a group's completions from which continuations may start."""

    trajectory: int
    """The first completion of the group that passes through it, in the order in which they were added."""
    boundary: int
    """Tokens of that completion before the state; 0 = the prompt."""
    prefix: tuple[int, ...]
    """[boundary] those tokens. Equal prefixes are one state."""
    parent: int
    """The state at which the segment that leads here starts; -1 for the root."""
    reach: float
    """Log-probability of the prefix under the policy that sampled it."""


@dataclass(slots=True)
class _Path:
    """One completion's way through the tree."""

    states: list[int] = field(default_factory=list)
    boundaries: Sequence[int] = (0,)
    segment_logprobs: list[float] = field(default_factory=list)
    tail: tuple[int, ...] = ()


class StateTree:
    """Grows with each completion; equal prefixes are one state.

    Example: completions (1, 2, 3) and (1, 2, 4) with boundaries (0, 2, 3) have two states, the prompt and (1, 2).
    """

    def __init__(self, group_size: int) -> None:
        """Start with the prompt's state alone."""
        self.states: list[State] = [State(trajectory=0, boundary=0, prefix=(), parent=-1, reach=0.0)]
        self._paths = [_Path() for _ in range(group_size)]
        self._index: dict[tuple[int, ...], int] = {(): ROOT}
        self._children: list[list[int]] = [[]]
        self._passing: list[list[int]] = [[]]

    def add(
        self, trajectory: int, token_ids: Sequence[int], logprobs: Sequence[float], boundaries: Sequence[int]
    ) -> list[int]:
        """Enter a completion.

        Args:
            trajectory: its index in the group.
            token_ids: [T].
            logprobs: [T], of the policy that sampled it.
            boundaries: 0 = b_0 < ... < b_n = T.

        Returns:
            The states that are new, earlier ones first.
        """
        first_new = len(self.states)
        path = self._paths[trajectory]
        path.boundaries = boundaries
        path.segment_logprobs = [math.fsum(logprobs[start:end]) for start, end in pairwise(boundaries)]
        path.tail = tuple(token_ids[boundaries[-2] :]) if len(boundaries) > 1 else ()
        reach, parent = 0.0, -1
        for boundary, of_segment in zip(boundaries, path.segment_logprobs, strict=False):
            parent = self._enter(trajectory, tuple(token_ids[:boundary]), parent, reach)
            reach += of_segment
            path.states.append(parent)
            self._passing[parent].append(trajectory)
        return list(range(first_new, len(self.states)))

    def path(self, trajectory: int) -> list[int]:
        """[n] the states at which the segments of a completion start."""
        return self._paths[trajectory].states

    def segment_logprobs(self, trajectory: int) -> list[float]:
        """[n] of a completion's segments, each given all before it, under the policy that sampled them."""
        return self._paths[trajectory].segment_logprobs

    def tail(self, trajectory: int) -> tuple[int, ...]:
        """The tokens of a completion's last segment."""
        return self._paths[trajectory].tail

    @property
    def group_size(self) -> int:
        """Completions of the group, those to come included."""
        return len(self._paths)

    def tokens(self, trajectory: int) -> int:
        """Length of a completion."""
        return self._paths[trajectory].boundaries[-1]

    def passing(self, state: int) -> list[int]:
        """The completions that pass through a state."""
        return self._passing[state]

    def children(self, state: int) -> list[int]:
        """The states that follow a state on some completion."""
        return self._children[state]

    def ancestors(self, state: int) -> Iterator[int]:
        """The states before a state, nearest first."""
        while (state := self.states[state].parent) >= ROOT:
            yield state

    def passed(self, state: int, token_ids: Sequence[int]) -> Iterator[int]:
        """The states through which a continuation of a state passes, that one first."""
        yield state
        start = self.states[state].boundary
        for child in self._children[state]:
            prefix = self.states[child].prefix
            segment = prefix[start:]
            if tuple(token_ids[: len(segment)]) == segment:
                yield from self.passed(child, token_ids[len(segment) :])

    def weights(self, segment: float, *, backed_up: bool = False) -> list[float]:
        """Tokens whose advantage an error of each state's value enters, by its square.

        By itself a value enters the segment that it ends and the one that it starts. Backed up (`actors.backup`), an error
        at state j goes on to those before it, P_k of it at each; the advantage of segment k < j, the difference of two
        values, then has (1 - P_k) P_{k+1} .. P_{j-1} of it.

        Args:
            segment: length that the segments which states start are taken to have. How completions go on from a state
                tells about its value, so it must have no say in the state's weight.
            backed_up: whether values are.
        """
        weights = [0.0] * len(self.states)
        for path in self._paths:
            carried = 0.0
            for state, (start, end), logprob in zip(
                path.states, pairwise(path.boundaries), path.segment_logprobs, strict=True
            ):
                follows = math.exp(min(logprob, 0.0)) if backed_up else 0.0
                weights[state] += segment + carried
                carried = carried * follows**2 + (end - start) * (1 - follows) ** 2
        return weights

    def leaving(self, state: int) -> float:
        """Probability that the policy leaves the one completion that passes through the state; 1 unless just one does."""
        if len(self._passing[state]) != 1:
            return 1.0
        path = self._paths[self._passing[state][0]]
        return -math.expm1(min(path.segment_logprobs[path.states.index(state)], 0.0))

    def remaining_tokens(self) -> list[float]:
        """Tokens after each state, mean over the completions that pass through it; what a continuation may cost."""
        return [
            sum(self._paths[t].boundaries[-1] for t in passing) / len(passing) - state.boundary if passing else 0.0
            for state, passing in zip(self.states, self._passing, strict=True)
        ]

    def _enter(self, trajectory: int, prefix: tuple[int, ...], parent: int, reach: float) -> int:
        if prefix not in self._index:
            self._index[prefix] = len(self.states)
            self._children[parent].append(len(self.states))
            self._children.append([])
            self._passing.append([])
            self.states.append(
                State(trajectory=trajectory, boundary=len(prefix), prefix=prefix, parent=parent, reach=reach)
            )
        return self._index[prefix]
