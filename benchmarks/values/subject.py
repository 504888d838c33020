"""What is judged: groups of a fixed policy, the reference of their states, and one estimator's view of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from actors.reward_actor import make_scorer
from actors.rollout import Rollout, Sampler
from actors.state_tree import State
from benchmarks.values.errors import JudgedCompletion, PromptErrors, prompt_errors
from benchmarks.values.reference import Reference
from learner.advantages import vineppo_advantages
from ray_rl.config import RunConfig
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.tokenizer import TokenizerCodec
from ray_rl.types import Completion, Prompt, Reward, ScoringItem, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPrompt:
    """One prompt with its group, and the reference of the states of its first completions."""

    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Sequence[Reward]
    reference: Reference
    judged: int
    """Completions that the reference covers; they are exchangeable, so the first ones speak for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """What one estimator made of all prompts."""

    errors: list[PromptErrors]
    """[prompts]"""
    tokens: list[int]
    """[prompts] of all continuations."""
    seconds: float
    groups: list[TrajectoryGroup]
    """[prompts]"""


class Subject:
    """A policy behind an engine, with a recipe's segmentation and reward."""

    def __init__(self, config: RunConfig, engine: Sampler, codec: TokenizerCodec) -> None:
        """Of a recipe with an estimator of its own, which is replaced by those that are compared."""
        self._config = config
        self._engine = engine
        self._codec = codec
        self._scorer = make_scorer(config.reward, [])

    async def prepare(self, prompts: Sequence[Prompt], *, judged: int, samples: int) -> tuple[list[JudgedPrompt], int]:
        """Sample the groups, then the reference; also the tokens that the reference took."""
        prepared = await asyncio.gather(*(self._prepare(prompt, judged, samples) for prompt in prompts))
        return [prompt for prompt, _ in prepared], sum(tokens for _, tokens in prepared)

    async def value(
        self, values: FixedValues | AdaptiveValues, prompts: Sequence[JudgedPrompt], sampler: Sampler | None = None
    ) -> Valued:
        """Let an estimator value all prompts at once, on the engine or on another sampler."""
        rollout = self._rollout(values, sampler or self._engine)
        started = time.perf_counter()
        groups = await asyncio.gather(*(rollout.values_of(p.prompt, p.completions, p.rewards) for p in prompts))
        return Valued(
            seconds=time.perf_counter() - started,
            errors=[errors_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)],
            tokens=[group.cost.continuation_tokens for group in groups],
            groups=list(groups),
        )

    def _rollout(self, values: Any, sampler: Sampler) -> Rollout:
        return Rollout(self._config.model_copy(update={"values": values}), sampler, self._scorer, self._codec)

    async def _prepare(self, prompt: Prompt, judged: int, samples: int) -> tuple[JudgedPrompt, int]:
        # One continuation a state is the cheapest way to the segments that every estimator will see.
        group = await self._rollout(FixedValues(num_continuations=1), self._engine).collect(prompt)
        reference = Reference(group.trajectories[:judged])

        async def draw(state: State, count: int) -> list[tuple[Sequence[int], float]]:
            limit = self._config.rollout.max_tokens - state.boundary
            drawn = await self._engine.generate((*prompt.token_ids, *state.prefix), n=count, max_tokens=limit)
            return [(completion.token_ids, await self._reward(prompt, state, completion)) for completion in drawn]

        tokens = await reference.fill(samples, draw)
        prepared = JudgedPrompt(
            prompt=prompt,
            completions=[trajectory.completion for trajectory in group.trajectories],
            rewards=[trajectory.reward for trajectory in group.trajectories],
            reference=reference,
            judged=judged,
        )
        return prepared, tokens

    async def _reward(self, prompt: Prompt, state: State, continuation: Completion) -> float:
        if not continuation.finished:
            return self._config.reward.unfinished
        text, _ = self._codec.decode_with_offsets((*state.prefix, *continuation.token_ids))
        (reward,) = await self._scorer.score([ScoringItem(problem=prompt.problem, completion_text=text)])
        return reward.value


def errors_of(prompt: JudgedPrompt, group: TrajectoryGroup) -> PromptErrors:
    """Of the judged completions of a group, as some estimator has valued them."""
    advantages = vineppo_advantages(group)
    completions = []
    for index in range(prompt.judged):
        trajectory, of_tokens = group.trajectories[index], advantages[index]
        assert of_tokens is not None, "the rewards of a benchmark never fail"
        reward = trajectory.reward.value
        completions.append(
            JudgedCompletion(
                reward=reward,
                lengths=[end - start for start, end in pairwise(trajectory.boundaries)],
                values=[value.mean for value in trajectory.values],
                advantages=[of_tokens[start] for start in trajectory.boundaries[:-1]],
                true_values=prompt.reference.values(index),
                true_advantages=prompt.reference.advantages(index, reward),
            )
        )
    return prompt_errors(completions)
