"""Pretended rollout actors for the pool: they serve, die, hang and load on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from actors.pool import ActorDied, ActorPool, PoolLimits, RolloutClient
from ray_rl.protocols import CollectedGroup, PublishedWeights, Receiver
from ray_rl.types import Prompt, ScoredSample
from ray_rl.weight_manifest import Probe
from tests.fakes import collected

PROBE = Probe(token_ids=(1, 2), logprobs=(-1.0,))
LIMITS: dict[str, Any] = {
    "groups_in_flight": 2,
    "start_timeout": 5,
    "group_timeout": 5,
    "publish_timeout": 5,
    "outage_timeout": 5,
    "max_attempts": 3,
    "restart_delay": 0.001,
}


async def make_probe() -> Probe:
    return PROBE


def weights(version: int, **changes: Any) -> PublishedWeights:
    return PublishedWeights(**({"version": version, "payload": None, "probe": make_probe} | changes))


def making(version: int, **changes: Any) -> Callable[[Sequence[Receiver]], Any]:
    async def make(receivers: Sequence[Receiver]) -> PublishedWeights:
        return weights(version, **changes)

    return make


class Actor:
    """What it does is changed from outside, beforehand or while it lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"actor {index}"
        self.home = "here"
        self.loads = asyncio.Event()
        self.loads.set()
        self.seconds = 0.0
        """Of one group."""
        self.hangs = False
        self.fatal: set[int] = set()
        """Positions of prompts that kill it."""
        self.error: Exception | None = None
        """Of collect."""
        self.start_error: Exception | None = None
        self.receive_error: Exception | None = None
        self.prove_error: Exception | None = None
        self.difference = 1e-7
        self.pause = 0.0
        self.version: int | None = None
        self.received: list[int] = []
        self.proven = False
        self.begun: list[int] = []
        self.served: list[int] = []
        self.unproven_work = 0
        self.at_once = self.most_at_once = 0
        self.gone = asyncio.Event()
        self.ended = False

    @property
    def receiver(self) -> Receiver:
        return Receiver(home=self.home, handle=self)

    def kill(self) -> None:
        self.gone.set()

    async def start(self) -> None:
        await self._unless_gone(self.loads.wait())
        if self.start_error:
            raise self.start_error

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        self.begun.append(prompt.position)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if prompt.position in self.fatal:
                self.kill()
            await self._work()
        finally:
            self.at_once -= 1
        self.served.append(prompt.position)
        return collected(prompt.position, version=self.version or 0)

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        await self._work()
        return ()

    async def receive_weights(self, weights: PublishedWeights) -> float:
        await self._unless_gone(asyncio.sleep(0))
        if self.receive_error:
            raise self.receive_error
        self.version = weights.version
        self.received.append(weights.version)
        return self.pause

    async def prove_weights(self, probe: Probe) -> float:
        await self._unless_gone(asyncio.sleep(0))
        if self.prove_error:
            raise self.prove_error
        self.proven = True
        return self.difference

    async def take_underfull(self) -> float:
        return float(self.index)

    async def stacks(self) -> str:
        await self._unless_gone(asyncio.sleep(0))
        return f"stacks of {self.name}"

    async def shutdown(self) -> None:
        self.gone.set()
        self.ended = True

    async def _work(self) -> None:
        self.unproven_work += not self.proven
        await self._unless_gone(asyncio.Event().wait() if self.hangs else asyncio.sleep(self.seconds))
        if self.error:
            raise self.error

    async def _unless_gone(self, work: Any) -> None:
        doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            doing.cancel()
            gone.cancel()
        if self.gone.is_set():
            raise ActorDied(f"{self.name} is gone")


class Actors:
    """All that a pool has made, by index; `prepare` sees each before the pool does."""

    def __init__(self, prepare: Callable[[Actor], None] = lambda actor: None) -> None:
        self._by_index: dict[int, Actor | None] = {}
        self.prepare = prepare

    def __call__(self, index: int) -> RolloutClient:
        assert index not in self._by_index
        self._by_index[index] = None
        actor = Actor(index)
        self.prepare(actor)
        self._by_index[index] = actor
        return actor

    def __getitem__(self, index: int) -> Actor:
        actor = self._by_index[index]
        assert actor
        return actor

    @property
    def made(self) -> list[Actor]:
        return [actor for actor in self._by_index.values() if actor]


@asynccontextmanager
async def running(
    size: int, prepare: Callable[[Actor], None] = lambda actor: None, *, published: bool = True, **changes: Any
) -> AsyncIterator[tuple[ActorPool, Actors, list[str]]]:
    """A pool that was started, and published to, with its actors and warnings. Everything must end with it."""
    actors, warnings = Actors(prepare), list[str]()
    serves_loaded = changes.pop("serves_loaded", False)
    limits = PoolLimits(**(LIMITS | changes))
    pool = ActorPool(actors, size, limits=limits, serves_loaded=serves_loaded, warn=warnings.append)
    before = asyncio.all_tasks()
    try:
        await pool.start()
        if published:
            await pool.publish(making(0))
        yield pool, actors, warnings
    finally:
        await pool.shutdown()
        await until(lambda: asyncio.all_tasks() == before)
    assert all(actor.ended for actor in actors.made)
    assert serves_loaded or not any(actor.unproven_work for actor in actors.made)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what comes by itself."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def states(pool: ActorPool) -> list[str]:
    return [status.state for status in pool.status()]
