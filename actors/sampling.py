"""What is sampled for one prompt, and the seeds with which, where a run is deterministic."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from ray_rl.config import RunConfig
from ray_rl.types import Completion, Prompt

_EVALUATION = -1


class Sampler(Protocol):
    """What a rollout needs of an engine."""

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float | None = None,
        priority: int = 0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Completion, ...]:
        """n completions of a prefix.

        Args:
            token_ids: the prefix.
            n: completions.
            max_tokens: longest completion.
            temperature: None is the configured one, 0 is greedy.
            priority: small ones go first.
            seeds: [n] one for each completion; None: the engine's own random numbers.
        """


def request_seed(run_seed: int, prompt: Prompt, prefix: Sequence[int], number: int) -> int:
    """The seed of one request, in [0, 2^63). It follows from what is asked alone: not from who samples it, nor when.

    Args:
        run_seed: of the run.
        prompt: to whose position in the stream, in evaluation to whose problem, the request belongs.
        prefix: tokens after the prompt that are continued.
        number: of requests for the same prefix before this one.
    """
    owner = prompt.problem.problem_id if prompt.position == _EVALUATION else prompt.position
    asked = repr((run_seed, owner, tuple(prefix), number))
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:8], "big") >> 1


class PromptSampling:
    """All that is sampled for one prompt, once. It counts, so that equal requests get seeds of their own."""

    def __init__(self, config: RunConfig, engine: Sampler, prompt: Prompt) -> None:
        """Nothing is asked for yet."""
        self.prompt = prompt
        self._config = config
        self._engine = engine
        self._asked: Counter[tuple[int, ...]] = Counter()

    async def sample(
        self, prefix: tuple[int, ...], count: int, temperature: float | None = None
    ) -> tuple[Completion, ...]:
        """Completions of the prompt or of a state's prefix; what belongs to earlier prompts goes first."""
        return await self._engine.generate(
            (*self.prompt.token_ids, *prefix),
            n=count,
            max_tokens=self._config.rollout.max_tokens - len(prefix),
            temperature=temperature,
            priority=self.prompt.position,
            seeds=self._seeds(prefix, count) if self._config.deterministic else None,
        )

    def _seeds(self, prefix: tuple[int, ...], count: int) -> list[int]:
        first = self._asked[prefix]
        self._asked[prefix] += count
        numbers = range(first, first + count)
        return [request_seed(self._config.seed, self.prompt, prefix, number) for number in numbers]
