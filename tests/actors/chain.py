"""An enumerable policy: a chain of segments, each right with probability q; the reward is 1 when all are right.

A token is a segment: 1 is right, 0 is wrong. The value of a state is exact: q^(segments left) while all is right, then 0.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from actors.values import Valuation
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.types import Completion, Continuation, GroupCost, Reward, Trajectory, TrajectoryGroup, VersionSpan
from tests.fakes import prompt


@dataclass(frozen=True)
class Chain:
    """n segments, each right with probability q."""

    n: int
    q: float

    def value(self, prefix: tuple[int, ...]) -> float:
        return self.q ** (self.n - len(prefix)) if all(prefix) else 0.0

    def sample(self, rng: random.Random, prefix: tuple[int, ...] = ()) -> Completion:
        tokens = tuple(int(rng.random() < self.q) for _ in range(self.n - len(prefix)))
        return Completion(
            token_ids=tokens,
            behavior_logprobs=tuple(math.log(self.q if token else 1 - self.q) for token in tokens),
            versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
            finish_reason="stop",
        )

    def reward(self, tokens: tuple[int, ...]) -> Reward:
        return Reward(value=float(all(tokens)))

    def group(
        self,
        config: FixedValues | AdaptiveValues,
        rng: random.Random,
        *,
        group_size: int = 8,
        completions: list[Completion] | None = None,
        reward: Callable[[tuple[int, ...]], Reward] | None = None,
    ) -> TrajectoryGroup:
        """A group valued as the rollout does it, but without an engine."""
        grade = reward or self.reward
        sampled = completions or [self.sample(rng) for _ in range(group_size)]
        valuation = Valuation(config, len(sampled))
        cuts = tuple(range(self.n + 1))
        for index, completion in enumerate(sampled):
            valuation.tree.add(index, completion.token_ids, completion.behavior_logprobs, cuts)
        rewards = [grade(completion.token_ids) for completion in sampled]
        for index, of_completion in enumerate(rewards):
            valuation.add_reward(index, of_completion)
        asked = (
            dict.fromkeys(range(len(valuation.tree.states)), valuation.at_once)
            if valuation.at_once
            else valuation.plan()
        )
        while asked:
            for state, count in asked.items():
                for _ in range(count):
                    at = valuation.tree.states[state]
                    completion = self.sample(rng, at.prefix)
                    valuation.add(
                        state,
                        Continuation(
                            trajectory=at.trajectory,
                            boundary=at.boundary,
                            completion=completion,
                            reward=grade((*at.prefix, *completion.token_ids)),
                        ),
                    )
            asked = valuation.plan()
        continuations = valuation.continuations()
        return TrajectoryGroup(
            prompt=prompt(token_ids=(9,)),
            trajectories=tuple(
                Trajectory(
                    completion=completion,
                    text="",
                    reward=of_completion,
                    boundaries=cuts,
                    values=valuation.values(index, cuts, of_completion),
                )
                for index, (completion, of_completion) in enumerate(zip(sampled, rewards, strict=True))
            ),
            continuations=continuations,
            cost=GroupCost(
                primary_tokens=self.n * len(sampled),
                prompt_tokens=0,
                cached_prompt_tokens=0,
                continuations=len(continuations),
                continuation_tokens=sum(len(c.completion.token_ids) for c in continuations),
                states=len(valuation.tree.states),
                closed_states=valuation.closed_states(),
                rounds=valuation.rounds,
                prefix_tokens=0,
                cacheable_prefix_tokens=0,
                cached_prefix_tokens=0,
                seconds=0.0,
            ),
        )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
