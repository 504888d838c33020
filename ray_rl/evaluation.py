"""Accuracy on held-out problems, sampled and greedy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ray_rl.config.orchestration import EvaluationConfig
from ray_rl.errors import RunError, first_error
from ray_rl.metrics import evaluation_metrics
from ray_rl.protocols import PromptFailed, RolloutPool
from ray_rl.types import Prompt, ScoredSample

logger = logging.getLogger(__name__)


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
        Metrics by name; see `ray_rl.metrics.evaluation_metrics`. Prompts that cost too many actors are left out, and said.

    Raises:
        RunError: no prompt could be answered.
    """
    sampled = await _answers(pool, prompts, config.samples, config.temperature, moved)
    greedy = await _answers(pool, prompts, 1, 0.0, moved) if config.greedy else [()] * len(prompts)
    answered = [index for index in range(len(prompts)) if sampled[index] is not None and greedy[index] is not None]
    if not answered:
        raise RunError(
            f"none of {len(prompts)} evaluation prompts could be answered; see the warnings before this line"
        )
    return evaluation_metrics(
        [prompts[index] for index in answered],
        [sampled[index] or () for index in answered],
        [greedy[index] or () for index in answered] if config.greedy else None,
    )


async def _answers(
    pool: RolloutPool, prompts: Sequence[Prompt], samples: int, temperature: float, moved: Callable[[str], None]
) -> list[tuple[ScoredSample, ...] | None]:
    """[P] answers; None where a prompt cost too many actors."""

    async def one(prompt: Prompt) -> tuple[ScoredSample, ...] | None:
        try:
            answers = await pool.evaluate(prompt, samples=samples, temperature=temperature)
        except PromptFailed as failure:
            logger.warning("left out of the evaluation: %s", failure)
            return None
        moved(f"the answer to evaluation prompt {prompt.problem.problem_id}")
        return answers

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in prompts]
    except ExceptionGroup as errors:
        raise first_error(errors) from errors
    return [task.result() for task in tasks]
