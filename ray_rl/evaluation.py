"""Accuracy on held-out problems, sampled and greedy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ray_rl.config.orchestration import EvaluationConfig
from ray_rl.errors import first_error
from ray_rl.metrics import evaluation_metrics
from ray_rl.protocols import RolloutPool
from ray_rl.types import Prompt, ScoredSample


async def evaluate(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    moved: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Sample `config.samples` answers per prompt and, if asked for, a greedy one.

    Args:
        pool: gives each prompt a place when it has one.
        prompts: at least one.
        config: how many answers.
        moved: told of every prompt that is answered.

    Returns:
        Metrics by name; see `ray_rl.metrics.evaluation_metrics`.
    """
    sampled = await _answers(pool, prompts, config.samples, config.temperature, moved)
    greedy = await _answers(pool, prompts, 1, 0.0, moved) if config.greedy else None
    return evaluation_metrics(prompts, sampled, greedy)


async def _answers(
    pool: RolloutPool, prompts: Sequence[Prompt], samples: int, temperature: float, moved: Callable[[str], None]
) -> list[tuple[ScoredSample, ...]]:
    async def one(prompt: Prompt) -> tuple[ScoredSample, ...]:
        answers = await pool.evaluate(prompt, samples=samples, temperature=temperature)
        moved(f"the answer to evaluation prompt {prompt.problem.problem_id}")
        return answers

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in prompts]
    except ExceptionGroup as errors:
        raise first_error(errors) from errors
    return [task.result() for task in tasks]
