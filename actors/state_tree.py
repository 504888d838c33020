"""The states between the segments of a group's completions, as a tree of prefixes (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
        reach, parent = 0.0, -1
        for start, boundary in zip((0, *boundaries), boundaries[:-1], strict=False):
            reach += sum(logprobs[start:boundary])
            parent = self._enter(trajectory, tuple(token_ids[:boundary]), parent, reach)
            path.states.append(parent)
            self._passing[parent].append(trajectory)
        return list(range(first_new, len(self.states)))

    def path(self, trajectory: int) -> list[int]:
        """[n] the states at which the segments of a completion start."""
        return self._paths[trajectory].states

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

    def weights(self) -> list[int]:
        """Tokens whose advantage each state's value enters: of the segments that it ends and that it starts."""
        weights = [0] * len(self.states)
        for path in self._paths:
            lengths = [end - start for start, end in zip(path.boundaries, path.boundaries[1:], strict=False)]
            for state, before, after in zip(path.states, [0, *lengths], lengths, strict=False):
                weights[state] += before + after
        return weights

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
