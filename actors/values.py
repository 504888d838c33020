"""Which states get how many continuations, and what a group's states are worth (pure but for who samples)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from actors.adaptive import AdaptiveEstimator
from actors.backup import Backup
from actors.evidence import Evidence, state_value
from actors.state_tree import StateTree
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.types import Continuation, Reward, StateValue, TrajectoryGroup


class Estimator(Protocol):
    """Decides, for one group, which states are continued; sees tokens and rewards only through tree and evidence."""

    def at_once(self) -> int:
        """Continuations of each state as soon as it is known, before any outcome is."""

    def plan(self) -> Mapping[int, int]:
        """The next round, once all completions and all continuations asked for are in: state -> continuations."""

    def closed_from(self, trajectory: int) -> int:
        """Index of a completion's first state that is worth its own reward; its number of segments when none is."""


class FixedEstimator:
    """K for every state (VinePPO, arXiv 2410.01679, section 4). Unbiased; variance p(1-p)/K for rewards in {0, 1}."""

    def __init__(self, config: FixedValues, tree: StateTree, evidence: Evidence) -> None:
        """Of one group."""
        self._config = config
        self._tree = tree

    def at_once(self) -> int:
        """K: no outcome is needed."""
        return self._config.num_continuations

    def plan(self) -> Mapping[int, int]:
        """Nothing more."""
        return {}

    def closed_from(self, trajectory: int) -> int:
        """No state."""
        return len(self._tree.path(trajectory))


ESTIMATORS: Mapping[str, Callable[[Any, StateTree, Evidence], Estimator]] = {
    "fixed": FixedEstimator,
    "adaptive": AdaptiveEstimator,
}
"""`values.kind` -> estimator of one group."""


class Valuation:
    """The values of one group in the making: the tree of states, what speaks for them, and what to ask for next."""

    def __init__(self, config: FixedValues | AdaptiveValues, group_size: int) -> None:
        """Before anything is sampled."""
        self._config = config
        self._pool = config.pooling != "none"
        self.tree = StateTree(group_size)
        self._evidence = Evidence(self.tree)
        self._estimator = ESTIMATORS[config.kind](config, self.tree, self._evidence)
        self._continuations: list[tuple[int, Continuation]] = []
        self._counted = 0
        self._rounds = 0

    @property
    def at_once(self) -> int:
        """Continuations of each state as soon as it is known."""
        return self._estimator.at_once()

    @property
    def rounds(self) -> int:
        """Rounds planned so far; what is asked for at once is the first."""
        return self._rounds + (self.at_once > 0)

    def add_reward(self, trajectory: int, reward: Reward) -> None:
        """Of a completion that is in the tree."""
        self._evidence.add_trajectory(trajectory, reward)

    def add(self, state: int, continuation: Continuation) -> None:
        """A scored continuation of a state."""
        self._continuations.append((state, continuation))

    def plan(self) -> Mapping[int, int]:
        """The next round of continuations, state -> number; nothing when all is decided.

        Only now, with all states known, can it be told through which of them a continuation passed.
        """
        for state, continuation in self._continuations[self._counted :]:
            self._evidence.add_continuation(state, continuation.completion.token_ids, continuation.reward)
        self._counted = len(self._continuations)
        asked = self._estimator.plan()
        self._rounds += bool(asked)
        return asked

    def values(self, trajectory: int, boundaries: Sequence[int], reward: Reward) -> tuple[StateValue, ...]:
        """[n] of the states at which a completion's segments start; after the last round."""
        path, closed = self.tree.path(trajectory), self._estimator.closed_from(trajectory)
        showed = len(self._evidence.of(path[closed], without=trajectory)) if closed < len(path) else 0
        closed_values = [
            StateValue(boundary=boundary, mean=reward.value, stderr=0.0, count=showed, closed=True)
            for boundary in boundaries[closed : len(path)]
        ]
        return (*self._sampled(trajectory, boundaries[:closed]), *closed_values)

    def _sampled(self, trajectory: int, boundaries: Sequence[int]) -> list[StateValue]:
        """Of a completion's first states, those that are not closed."""
        if self._config.pooling == "backup":
            return self._backup.values(trajectory, boundaries)
        return [
            state_value(boundary, self._evidence.of(state, pool=self._pool, without=trajectory))
            for boundary, state in zip(boundaries, self.tree.path(trajectory), strict=False)
        ]

    @cached_property
    def _backup(self) -> Backup:
        """Made once all evidence is in."""
        certain = self._config.certain if isinstance(self._config, AdaptiveValues) else 0.0
        return Backup(self.tree, self._evidence, certain=certain)

    def continuations(self) -> tuple[Continuation, ...]:
        """All of them, each with the value of its state as the others tell it."""
        return tuple(
            replace(continuation, baseline=self._evidence.baseline(state, continuation.reward, pool=self._pool))
            for state, continuation in sorted(self._continuations, key=lambda pair: pair[0])
        )

    def closed_states(self) -> int:
        """States whose value no completion needed samples of."""
        open_states = {
            state
            for trajectory in range(self.tree.group_size)
            for state in self.tree.path(trajectory)[: self._estimator.closed_from(trajectory)]
        }
        return len(self.tree.states) - len(open_states)


def replay(config: FixedValues | AdaptiveValues, group: TrajectoryGroup) -> list[dict[int, int]]:
    """Decide again what was decided for a recorded group.

    Returns:
        For each round the number of continuations asked for, by state; states are numbered as the completions, in their
        order, reach them. The prompt is 0.

    Raises:
        ValueError: the record does not hold what is asked for, so it was made under another configuration or code.
    """
    valuation = Valuation(config, len(group.trajectories))
    for index, trajectory in enumerate(group.trajectories):
        completion = trajectory.completion
        valuation.tree.add(index, completion.token_ids, completion.behavior_logprobs, trajectory.boundaries)
    for index, trajectory in enumerate(group.trajectories):
        valuation.add_reward(index, trajectory.reward)
    recorded: dict[tuple[int, ...], list[Continuation]] = {}
    for continuation in group.continuations:
        tokens = group.trajectories[continuation.trajectory].completion.token_ids
        recorded.setdefault(tokens[: continuation.boundary], []).append(continuation)
    rounds = []
    asked: Mapping[int, int] = dict.fromkeys(range(len(valuation.tree.states)), valuation.at_once)
    if not valuation.at_once:
        asked = valuation.plan()
    while asked:
        rounds.append(dict(asked))
        for state, count in asked.items():
            of_state = recorded.get(valuation.tree.states[state].prefix, [])
            if len(of_state) < count:
                raise ValueError(f"the record lacks {count - len(of_state)} continuations of state {state}")
            for continuation in of_state[:count]:
                valuation.add(state, continuation)
            del of_state[:count]
        asked = valuation.plan()
    if left := sum(map(len, recorded.values())):
        raise ValueError(f"{left} continuations of the record are not asked for")
    return rounds
