"""Continuations only where the outcome is open (pure decisions; the rules and the bound are derived here).

close    A state's value cannot leave the ends of the reward's range: once there, it stays to the end. Where n samples of a
         state all agree with a completion's reward, and that is such an end, the state and all after it are taken for worth
         it. With `closing: groups` only the prompt's state is tested, by the group's other completions: a group whose
         rewards are all equal costs nothing. With `states` each completion is searched for the first state from which on
         its reward is certain: a sample that differs opens the state and all before it, and the next state tested is the
         one whose test says most per token (`_worth`); what is open is filled meanwhile, for it passes through the others.
fill     In one round, K_s = K sqrt(w_s l_s v_s / c_s) samples for a state that is not closed (Neyman's allocation; K is for
         a state of one completion, halfway, with everything open). w_s is the weight of an error of its value, in tokens
         whose advantage it enters (`StateTree.weights`); l_s the part of the value that chance tells (`_leaving`); v_s the
         reward's variance, read from the neighbouring states' samples, with one more at each end of the range; c_s
         what a continuation may cost, in tokens. Samples that are there, and what is likely to pass through on its way
         from earlier states, by the policy's own probabilities, save fresh ones.
values   Closed states have the value of the completion's own reward; the others are the mean of their samples, or are
         backed up over the tree (`actors.backup`).

A mean over a number of samples is unbiased if neither they nor what follows from them decide the number. So no sample of a
state has a say in it: neither its rewards nor how a completion that passes goes on from there. (Not quite: a budget that
binds lowers all numbers by one factor, to which everything contributes a little, and c_s is a mean over such completions.)
What errs is closing. For a chain of states whose value is p, a completion that fails (probability 1 - p) and tests that n
samples pass by chance with (1 - p)^n each, the expected error is p (1 - p) (1 - (1 - (1 - p)^n)^tests), for one test of 7
samples at most .043; `false_agreement` is its largest value over p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from actors.evidence import Evidence
from actors.state_tree import ROOT, StateTree
from ray_rl.config.values import AdaptiveValues
from ray_rl.errors import RunError

_MOST_OVER_K = 3.0
"""No state is to get more than so many times K."""
_SCALES = tuple(0.9**step for step in range(40))
"""By which the wanted numbers of samples are lowered, one after the other, until they fit the budget."""
_LEAST_SURVIVAL = 0.02


def false_agreement(samples: int, tests: int) -> float:
    """Largest expected error of a value, over all p, when `samples` agreeing ones close a state (module docstring)."""
    grid = (index / 1000 for index in range(1, 1000))
    return max(p * (1 - p) * (1 - (1 - (1 - p) ** samples) ** tests) for p in grid)


def count_tests(closing: str, segments: int) -> int:
    """Tests that a completion undergoes: of the prompt's state, then as many as a bisection of the others takes."""
    return 1 if closing == "groups" else 1 + math.ceil(math.log2(max(segments, 1)))


@lru_cache
def samples_to_close(max_bias: float, tests: int) -> int:
    """The fewest agreeing samples that keep the bias of a completion that undergoes so many tests within `max_bias`."""
    samples = 1
    while false_agreement(samples, tests) > max_bias:
        samples += 1
    return samples


def _scaled(wanted: Mapping[int, float], scale: float) -> dict[int, float]:
    return {state: scale * count for state, count in wanted.items()}


@dataclass(slots=True, kw_only=True)
class _Search:
    """Where on one completion the outcome becomes certain, as far as it is known."""

    path: Sequence[int]
    """The states at which its segments start."""
    outcome: float | None
    """Its reward; None if it could not be graded."""
    needed: int
    """Samples that close a state; 0: none can."""
    tested: int
    """Only this many of the first states may be tested."""
    open: int
    """Index of the last state known to be open; -1: none."""
    closed: int
    """Index of the first state known to be closed; len(path): none."""

    @property
    def done(self) -> bool:
        """Whether no test is left."""
        return not self.needed or self.open + 1 >= min(self.closed, self.tested)


class AdaptiveEstimator:
    """Decides round by round; the same evidence leads to the same decisions."""

    def __init__(self, config: AdaptiveValues, tree: StateTree, evidence: Evidence) -> None:
        """Of one group; the caller adds completions, then each round's continuations, to tree and evidence."""
        self._config = config
        self._tree = tree
        self._evidence = evidence
        self._searches: list[_Search] = []
        self._tested: dict[int, int] = {}
        self._filled = False

    def at_once(self) -> int:
        """Continuations of a state before any outcome is known: none."""
        return 0

    def plan(self) -> Mapping[int, int]:
        """The next round: how many continuations of which states; nothing when all is decided.

        Raises:
            RunError: a reward outside of the configured range.
        """
        self._check_range()
        if not self._searches:
            self._begin()
        if self._filled:
            return {}
        if tests := self._tests():
            opened = {state for search in self._searches for state in search.path[: search.open + 1]}
            if paid := self._affordable({**self._missing(opened - tests.keys()), **tests}):
                return paid
        self._filled = True
        return self._fill()

    def closed_from(self, trajectory: int) -> int:
        """Index of a completion's first closed state; its number of segments when none is."""
        return self._searches[trajectory].closed

    def _begin(self) -> None:
        group = range(self._tree.group_size)
        tokens = sum(self._tree.tokens(trajectory) for trajectory in group)
        self._length = tokens / len(group)
        self._segment = tokens / max(sum(len(self._tree.path(trajectory)) for trajectory in group), 1)
        self._costs = self._tree.remaining_tokens()
        self._weights = self._tree.weights(self._segment, backed_up=self._config.pooling == "backup")
        self._left = self._config.token_budget * tokens
        for trajectory in group:
            path, outcome = self._tree.path(trajectory), self._evidence.outcome(trajectory)
            closes = outcome in self._config.reward_range and self._config.max_bias > 0
            tests = count_tests(self._config.closing, len(path))
            self._searches.append(
                _Search(
                    path=path,
                    outcome=outcome,
                    needed=samples_to_close(self._config.max_bias, tests) if closes else 0,
                    tested=1 if self._config.closing == "groups" else len(path),
                    open=-1,
                    # What was not graded does not train: none of its states needs a value for its sake.
                    closed=0 if outcome is None else len(path),
                )
            )

    def _tests(self) -> dict[int, int]:
        """Move every search as far as the evidence goes; the samples that the next tests lack."""
        lacking: dict[int, int] = {}
        for trajectory, search in enumerate(self._searches):
            while not search.done:
                index = self._next_test(trajectory)
                state = search.path[index]
                self._tested[state] = max(search.needed, self._tested.get(state, 0))
                lacks = self._lacks(trajectory, state)
                if lacks is None:
                    search.open = index
                elif lacks == 0:
                    search.closed = index
                else:
                    lacking[state] = max(lacks, lacking.get(state, 0))
                    break
        return lacking

    def _lacks(self, trajectory: int, state: int) -> int | None:
        """Samples that the test of a state lacks for this completion; None when one speaks against its reward already."""
        search = self._searches[trajectory]
        rewards = self._evidence.of(state, without=trajectory)
        if any(reward != search.outcome for reward in rewards):
            return None
        return max(search.needed - len(rewards), 0)

    def _next_test(self, trajectory: int) -> int:
        """Index of the state to test: the prompt's, then the one whose test says most per token."""
        search = self._searches[trajectory]
        if search.open < 0:
            return ROOT
        return max(range(search.open + 1, search.closed), key=lambda index: self._worth(trajectory, index))

    def _worth(self, trajectory: int, index: int) -> float:
        """Expected information per token of a test, shared by all completions that ask for it.

        Each segment is taken to settle the matter with the same probability; the group's rewards tell which: with a share
        f of rewards like this one, a chain of n segments goes on being open with (1 - f)^(1/n) at each.
        """
        search = self._searches[trajectory]
        alike = sum(other.outcome == search.outcome for other in self._searches) / len(self._searches)
        survival = max(1 - alike, _LEAST_SURVIVAL) ** (1 / len(search.path))
        before, here, after = (survival**k for k in (search.open, index, search.closed))
        share = (before - here) / (before - after)
        information = -share * math.log(share) - (1 - share) * math.log(1 - share)
        state = search.path[index]
        askers = sum(not self._searches[other].done for other in self._tree.passing(state))
        tokens = (self._lacks(trajectory, state) or 0) * self._costs[state] / askers
        return information / (tokens + 1e-6)

    def _fill(self) -> dict[int, int]:
        """Fresh continuations of all states that are not closed, as many as the budget allows."""
        states = {state for search in self._searches for state in search.path[: search.closed]}
        most = self._wanted(states, lambda _: self._largest_variance())
        # What the budget allows is told by the most that could be wanted: no reward has a say in it.
        scale = next((s for s in _SCALES if self._cost(self._missing(states, _scaled(most, s))) <= self._left), 0.0)
        return self._affordable(self._missing(states, _scaled(self._wanted(states, self._variance), scale)))

    def _wanted(self, states: Iterable[int], variance: Callable[[int], float]) -> dict[int, float]:
        """K_s = K sqrt(w l v / c), each measured by that of an open state halfway along one completion."""
        wanted = {}
        for state in states:
            importance = self._weights[state] / (2 * self._segment) * self._leaving(state)
            importance *= variance(state) / self._largest_variance()
            importance *= 0.5 * self._length / max(self._costs[state], 1.0)
            wanted[state] = self._config.num_continuations * min(math.sqrt(importance), _MOST_OVER_K)
        return wanted

    def _largest_variance(self) -> float:
        low, high = self._config.reward_range
        return (high - low) ** 2 / 4

    def _leaving(self, state: int) -> float:
        """Probability of what only chance tells about a state: all, unless the tree backs its value up.

        Where several completions pass, how they go on is a sample of the state's value, which must not choose their number.
        """
        return self._tree.leaving(state) if self._config.pooling == "backup" else 1.0

    def _variance(self, state: int) -> float:
        """Of the reward from a state as its neighbours' samples tell it, with one at each end of the range added."""
        rewards = [*self._config.reward_range, *self._evidence.of_neighbours(state)]
        mean = math.fsum(rewards) / len(rewards)
        return math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)

    def _missing(self, states: Iterable[int], wanted: Mapping[int, float] | None = None) -> dict[int, int]:
        """Fresh continuations that bring each state to its number (default K); earlier states first: they help later ones."""
        plan: dict[int, int] = {}
        for state in sorted(states, key=lambda state: (self._tree.states[state].boundary, state)):
            target = self._config.num_continuations if wanted is None else wanted[state]
            # A tested state gets the test's number in any case: how many it got must not tell what they were.
            target = max(target, self._tested.get(state, 0))
            has, expected = self._usable(state), self._expected(state, plan)
            # A state that no sample speaks for has no value, unless the policy is sure to follow the completion there.
            least = 0 if has or self._leaving(state) <= self._config.certain else 1
            fresh = max(round(target - has - expected), least)
            if fresh:
                plan[state] = fresh
        return plan

    def _usable(self, state: int) -> int:
        """Samples for the value that a completion sees at a state on its way: its own, if pooled, left out."""
        pools = self._config.pooling != "none"
        samples = len(self._evidence.of(state, pool=pools))
        return max(samples - 1, 0) if pools else samples

    def _expected(self, state: int, plan: Mapping[int, int]) -> float:
        """Planned continuations of earlier states that are likely to pass through a state."""
        if self._config.pooling == "none":
            return 0.0
        states = self._tree.states
        return math.fsum(
            plan.get(ancestor, 0) * math.exp(min(states[state].reach - states[ancestor].reach, 0.0))
            for ancestor in self._tree.ancestors(state)
        )

    def _cost(self, plan: Mapping[int, int]) -> float:
        return math.fsum(count * self._costs[state] for state, count in plan.items())

    def _affordable(self, plan: Mapping[int, int]) -> dict[int, int]:
        """As much of a plan, in its order, as the budget pays; it is taken off the budget."""
        paid: dict[int, int] = {}
        for state, count in plan.items():
            cost = max(self._costs[state], 1.0)
            affordable = min(count, int(self._left / cost))
            if affordable > 0:
                paid[state] = affordable
                self._left -= affordable * cost
        return paid

    def _check_range(self) -> None:
        low, high = self._config.reward_range
        for sample in self._evidence.samples:
            if not low <= sample.reward <= high:
                raise RunError(
                    f"values.reward_range: a reward of {sample.reward:g} lies outside of [{low:g}, {high:g}]; set it to the "
                    "smallest and the largest reward there can be"
                )
