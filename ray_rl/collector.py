"""The collect loop: keeps as many groups in flight as the buffer admits, and knows which prompts must be sampled again."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable

from ray_rl.buffer import StalenessBuffer
from ray_rl.errors import RunError
from ray_rl.ledger import Ledger
from ray_rl.prompt_stream import PromptStream
from ray_rl.protocols import PromptFailed, RolloutPool
from ray_rl.startup import Startup
from ray_rl.types import Prompt

_FAILURES_IN_A_ROW = 3
"""Prompts that may fail one after the other, without any group between them, before the fault is taken to be the run's."""


class RunStopped(RunError):
    """The run cannot go on sensibly; the message says why and what to change."""


class Collector:
    """Draws prompts, has the pool make groups of them, and hands these to the buffer."""

    def __init__(
        self,
        pool: RolloutPool,
        buffer: StalenessBuffer,
        stream: PromptStream,
        ledger: Ledger,
        *,
        warn: Callable[[str], None],
        moved: Callable[[str], None],
        startup: Startup,
    ) -> None:
        """Nothing is sampled before `run`.

        Args:
            pool: where groups are sampled.
            buffer: where they go.
            stream: where prompts come from.
            ledger: told of every prompt that is drawn or dropped here.
            warn: told of prompts that are given up.
            moved: told of every group that is finished.
            startup: told of the first group.
        """
        self._pool = pool
        self._buffer = buffer
        self._stream = stream
        self._ledger = ledger
        self._warn = warn
        self._moved = moved
        self._startup = startup
        self._again: list[int] = []
        self._failures = 0

    def sample_again(self, positions: Iterable[int]) -> None:
        """These prompts, which were drawn before, come first from now on, the earliest first."""
        for position in positions:
            heapq.heappush(self._again, position)

    async def run(self) -> None:
        """Go on until cancelled; the first failure ends the loop.

        Raises:
            RunStopped: prompt after prompt fails.
            NoActorsLeft: no rollout actor came back.
        """
        async with asyncio.TaskGroup() as groups:
            while True:
                ticket = await self._buffer.admit()
                groups.create_task(self._collect(self._next_prompt(), ticket))

    def _next_prompt(self) -> Prompt:
        prompt = self._stream.at(heapq.heappop(self._again)) if self._again else self._stream.next()
        self._ledger.draw(prompt.position)
        return prompt

    async def _collect(self, prompt: Prompt, ticket: int) -> None:
        self._startup.reached("first_request")
        try:
            group = await self._pool.collect(prompt)
        except PromptFailed as failure:
            await self._give_up(prompt, failure)
            return
        self._failures = 0
        self._startup.reached("first_group")
        self._moved(f"the group of prompt {prompt.prompt_id}")
        if not await self._buffer.put(group, ticket):
            self.sample_again([prompt.position])

    async def _give_up(self, prompt: Prompt, failure: PromptFailed) -> None:
        self._failures += 1
        if self._failures >= _FAILURES_IN_A_ROW:
            raise RunStopped(
                f"{self._failures} prompts failed one after the other, so the fault is not theirs; the last: {failure}"
            ) from failure
        self._warn(f"dropped: {failure}")
        self._ledger.drop(prompt.position, "failed")
        await self._buffer.give_up()
