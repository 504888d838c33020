"""Accuracy on held-out problems, sampled and greedy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray_rl.config.orchestration import EvaluationConfig
from ray_rl.metrics import evaluation_metrics
from ray_rl.protocols import RolloutPool
from ray_rl.types import Prompt, ScoredSample

_REQUESTS_PER_PLACE = 4
"""A group's place in an engine is worth this many single answers: evaluation has no continuations."""


async def evaluate(pool: RolloutPool, prompts: Sequence[Prompt], config: EvaluationConfig) -> dict[str, float]:
    """Sample `config.samples` answers per prompt and, if asked for, a greedy one.

    Returns:
        Metrics by name; see `ray_rl.metrics.evaluation_metrics`.
    """
    sampled = await _answers(pool, prompts, config.samples, config.temperature)
    greedy = await _answers(pool, prompts, 1, 0.0) if config.greedy else None
    return evaluation_metrics(prompts, sampled, greedy)


async def _answers(
    pool: RolloutPool, prompts: Sequence[Prompt], samples: int, temperature: float
) -> list[tuple[ScoredSample, ...]]:
    places = asyncio.Semaphore(max(1, pool.capacity * _REQUESTS_PER_PLACE // samples))

    async def one(prompt: Prompt) -> tuple[ScoredSample, ...]:
        async with places:
            return await pool.evaluate(prompt, samples=samples, temperature=temperature)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt)) for prompt in prompts]
    return [task.result() for task in tasks]
