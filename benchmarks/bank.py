"""Continuations of an engine, kept by prefix, so that estimators are compared on the same draws."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from actors.rollout import Sampler
from ray_rl.types import Completion


class Bank:
    """The k-th continuation of a prefix is the same for whoever asks for k of them; what is lacking is sampled.

    Two estimators that ask for 3 and for 9 continuations of a state share the first 3: their difference is then the
    estimators' and not the draws'. Each estimator still sees independent samples of the policy.
    """

    def __init__(self, engine: Sampler) -> None:
        """Empty."""
        self._engine = engine
        self._drawn: defaultdict[tuple[int, ...], list[Completion]] = defaultdict(list)
        self._locks: defaultdict[tuple[int, ...], asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def tokens(self) -> int:
        """Sampled so far."""
        return sum(len(completion.token_ids) for drawn in self._drawn.values() for completion in drawn)

    def reader(self) -> BankReader:
        """For one estimator: begins at the first continuation of every prefix."""
        return BankReader(self)

    async def take(self, token_ids: tuple[int, ...], start: int, n: int, max_tokens: int) -> tuple[Completion, ...]:
        """Continuations start to start + n of a prefix, which must always come with the same max_tokens."""
        async with self._locks[token_ids]:
            drawn = self._drawn[token_ids]
            lacking = start + n - len(drawn)
            if lacking > 0:
                drawn += await self._engine.generate(token_ids, n=lacking, max_tokens=max_tokens)
            return tuple(drawn[start : start + n])


class BankReader:
    """A sampler that reads a bank; never the same continuation twice."""

    def __init__(self, bank: Bank) -> None:
        """Use `Bank.reader`."""
        self._bank = bank
        self._read: defaultdict[tuple[int, ...], int] = defaultdict(int)

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
        """The next n continuations of a prefix, at the configured temperature."""
        if temperature is not None:
            raise ValueError("a bank holds continuations at the configured temperature only")
        prefix = tuple(token_ids)
        start = self._read[prefix]
        self._read[prefix] += n
        return await self._bank.take(prefix, start, n, max_tokens)
