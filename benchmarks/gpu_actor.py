"""A rollout actor that also tells what its engine computes and holds, for `gpu-check`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from actors.rollout_actor import RolloutActor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A completion with its prompt, and what the engine thought of each of its tokens."""

    token_ids: tuple[int, ...]
    """[P + T], prompt and completion."""
    logprobs: tuple[float, ...]
    """[T], natural log, temperature 1."""


class CheckedActor(RolloutActor):
    """A rollout actor with three more verbs."""

    async def sample(self, prompts: Sequence[Sequence[int]], count: int, max_tokens: int) -> list[Sampled]:
        """`count` completions of each prompt."""
        return [
            Sampled(token_ids=(*prompt, *completion.token_ids), logprobs=completion.behavior_logprobs)
            for prompt in prompts
            for completion in await self._engine.generate(prompt, n=count, max_tokens=max_tokens)
        ]

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """As `Engine.prompt_logprobs`."""
        return await self._engine.prompt_logprobs(token_ids)

    async def checksum(self) -> str:
        """One number for all bytes of all parameters, on all GPUs of the engine, as vLLM lays them out."""
        digests = await self._engine._llm.compute_weight_checksums()
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
