"""What is judged: groups of a fixed policy, the reference of their states, and one estimator's view of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from actors.rollout import Sampler
from benchmarks.subject import Subject
from benchmarks.values.errors import JudgedCompletion, PromptErrors, prompt_errors
from benchmarks.values.reference import Reference
from learner.advantages import vineppo_advantages
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.types import TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedGroup:
    """The group of one prompt, and the reference of the states of its first completions."""

    group: TrajectoryGroup
    reference: Reference
    judged: int
    """Completions that the reference covers; they are exchangeable, so the first ones speak for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """What one estimator made of all groups."""

    errors: list[PromptErrors]
    """[prompts]"""
    tokens: list[int]
    """[prompts] of all continuations."""
    seconds: float


async def judged_groups(subject: Subject, prompts: int, *, judged: int, samples: int) -> tuple[list[JudgedGroup], int]:
    """Sample the groups of so many prompts, then the reference; also the tokens that the reference took."""

    async def one() -> tuple[JudgedGroup, int]:
        prompt = subject.next_prompt()
        group = await subject.group(prompt)
        reference = Reference(group.trajectories[:judged])
        tokens = await reference.fill(samples, partial(subject.continuations, prompt))
        return JudgedGroup(group=group, reference=reference, judged=judged), tokens

    found = await asyncio.gather(*(one() for _ in range(prompts)))
    return [group for group, _ in found], sum(tokens for _, tokens in found)


async def value(
    subject: Subject,
    values: FixedValues | AdaptiveValues,
    groups: Sequence[JudgedGroup],
    sampler: Sampler | None = None,
) -> Valued:
    """Let an estimator value all groups at once, on the engine or on another sampler."""
    started = time.perf_counter()
    found = await asyncio.gather(*(subject.valued(judged.group, values, sampler) for judged in groups))
    return Valued(
        seconds=time.perf_counter() - started,
        errors=[errors_of(judged, group) for judged, group in zip(groups, found, strict=True)],
        tokens=[group.cost.continuation_tokens for group in found],
    )


def errors_of(judged: JudgedGroup, group: TrajectoryGroup) -> PromptErrors:
    """Of the judged completions of a group, as some estimator has valued them."""
    advantages = vineppo_advantages(group)
    completions = []
    for index in range(judged.judged):
        trajectory, of_tokens = group.trajectories[index], advantages[index]
        assert of_tokens is not None, "the rewards of a benchmark never fail"
        reward = trajectory.reward.value
        completions.append(
            JudgedCompletion(
                reward=reward,
                lengths=[end - start for start, end in pairwise(trajectory.boundaries)],
                values=[value.mean for value in trajectory.values],
                advantages=[of_tokens[start] for start in trajectory.boundaries[:-1]],
                true_values=judged.reference.values(index),
                true_advantages=judged.reference.advantages(index, reward),
            )
        )
    return prompt_errors(completions)
