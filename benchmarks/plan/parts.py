"""Rollout actors and a learner of a plan: they do nothing, and take the time that the rates say."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.plan.engine import SimulatedEngine
from benchmarks.plan.rates import Rates
from benchmarks.simulated import SimulatedActor, SimulatedLearner
from ray_rl.config import RunConfig
from ray_rl.config.values import FixedValues, NoValues
from ray_rl.protocols import CollectedGroup, PublishedWeights
from ray_rl.types import NO_COST, GroupSummary, Prompt, StepStats


class Draws:
    """What is left to chance: for each position of the prompt stream the same, however a cluster is split."""

    def __init__(self, config: RunConfig, rates: Rates) -> None:
        """Of one recipe."""
        self._config = config
        self._rates = rates
        spread = math.log1p(rates.lengths.cv**2)
        self._mu, self._sigma = math.log(rates.lengths.mean) - spread / 2, math.sqrt(spread)

    def completions(self, rng: random.Random) -> list[int]:
        """Lengths of a group's completions."""
        measured, count = self._rates.lengths.measured, self._config.rollout.group_size
        if measured:
            return [self._cut(length) for length in rng.choices(measured, k=count)]
        return [self._cut(rng.lognormvariate(self._mu, self._sigma)) for _ in range(count)]

    def continuations(self, rng: random.Random, completion: int) -> list[int]:
        """Lengths of the continuations that a completion of this length gets."""
        of_them = self._rates.continuations
        if not of_them.per_completion:
            return []
        count = int(of_them.per_completion + rng.random())
        mean = of_them.tokens_ratio * completion / of_them.per_completion
        return [self._cut(mean * rng.lognormvariate(-(self._sigma**2) / 2, self._sigma)) for _ in range(count)]

    def _cut(self, length: float) -> int:
        return min(self._config.rollout.max_tokens, max(1, round(length)))


class PlannedActor(SimulatedActor):
    """A rollout actor with a simulated engine; what it asks of it, and when, is what `actors.rollout` would ask."""

    def __init__(self, index: int, config: RunConfig, rates: Rates, draws: Draws, sync_seconds: float) -> None:
        """Actor `index`, which new weights stop for so many seconds."""
        super().__init__(index, lambda position: 0.0)
        self._config = config
        self._rates = rates
        self._draws = draws
        self._sync_seconds = sync_seconds
        self.engine = SimulatedEngine(rates.engine.tokens_per_second, config.rollout.max_sequences)

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """A group, and what state values ask for besides."""
        version, rng = self._version, random.Random(prompt.position)
        rates, lengths = self._rates, self._draws.completions(rng)
        prefill = rates.lengths.prompt / rates.engine.prefill_tokens_per_second
        continued: list[int] = []
        if isinstance(self._config.values, NoValues):
            await self.engine.sample(lengths, age=prompt.position, prefill_seconds=prefill)
        else:
            of_each = [self._draws.continuations(rng, length) for length in lengths]
            continued = [length for of_one in of_each for length in of_one]
            await self._valued(prompt, lengths, of_each, prefill)
        await asyncio.sleep(rates.reward_seconds + rates.engine.group_seconds)
        decided = rng.random() < rates.decided_share
        summary = _summary(prompt, version, self._version, lengths, continued, 0.0 if decided else 1.0)
        return CollectedGroup(prompt=prompt, ref=None, summary=summary)

    async def receive_weights(self, weights: PublishedWeights) -> float:
        """Stop for as long as it takes, and take the version."""
        await self.engine.pause(self._sync_seconds, drain=self._config.weights.running == "wait")
        self._version = weights.version
        return self._sync_seconds

    async def _valued(
        self, prompt: Prompt, lengths: Sequence[int], of_each: Sequence[Sequence[int]], prefill: float
    ) -> None:
        """With K continuations a completion is continued as soon as it is there; else where to is known when all are graded."""
        age = prompt.position
        if isinstance(self._config.values, FixedValues):

            async def one(length: int, continued: Sequence[int], prefill: float) -> None:
                await self.engine.sample([length], age=age, prefill_seconds=prefill)
                await self.engine.sample(continued, age=age)

            prefills = [prefill, *[0.0] * (len(lengths) - 1)]
            await asyncio.gather(*map(one, lengths, of_each, prefills))
        else:
            await self.engine.sample(lengths, age=age, prefill_seconds=prefill)
            await asyncio.sleep(self._rates.reward_seconds)
            await self.engine.sample([length for of_one in of_each for length in of_one], age=age)


class PlannedLearner(SimulatedLearner):
    """A learner whose steps take as long as their tokens."""

    def __init__(self, config: RunConfig, rates: Rates, groups_each: float) -> None:
        """With the ranks of a configuration.

        Args:
            config: of the run that is simulated.
            rates: of one rank.
            groups_each: how many groups of the planned run each simulated one stands for.
        """
        super().__init__(0.0)
        self._config = config
        self._rates = rates.learner
        self._prompt_tokens = rates.lengths.prompt * (1 if config.shares_prefixes else config.rollout.group_size)
        self._groups_each = groups_each

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """Take the time."""
        await asyncio.sleep(self.seconds([group.summary for group in groups]))
        return StepStats(metrics={})

    def seconds(self, groups: Sequence[GroupSummary]) -> float:
        """Of a step: tokens are dealt out evenly, but a sequence is not divided; every optimizer step costs something besides."""
        learner, trains_all = self._config.learner, self._config.trains_on_continuations
        sampled = [
            group.cost.primary_tokens + (group.cost.continuation_tokens if trains_all else 0) for group in groups
        ]
        tokens = self._groups_each * (sum(sampled) + self._prompt_tokens * len(groups))
        sequences = self._groups_each * len(groups) * self._config.rollout.group_size
        minibatch = learner.minibatch_size or sequences
        updates = max(1.0, sequences / minibatch)
        longest = max((max(group.lengths) for group in groups), default=0)
        of_rank = max(tokens / learner.ranks, updates * longest)
        return learner.epochs * (updates * self._rates.fixed_seconds + of_rank / self._rates.tokens_per_second)


def _summary(
    prompt: Prompt, oldest: int, newest: int, lengths: Sequence[int], continued: Sequence[int], best: float
) -> GroupSummary:
    cost = replace(
        NO_COST, primary_tokens=sum(lengths), continuations=len(continued), continuation_tokens=sum(continued)
    )
    return GroupSummary(
        prompt_id=prompt.prompt_id,
        position=prompt.position,
        oldest_version=oldest,
        newest_version=newest,
        rewards=(0.0, best),
        lengths=tuple(lengths),
        truncated=0,
        failures=0,
        graded=len(lengths) + len(continued),
        segments=len(lengths),
        value_mean=math.nan,
        value_stderr=math.nan,
        cost=cost,
    )
