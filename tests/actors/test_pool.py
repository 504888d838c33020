import asyncio
from types import SimpleNamespace

import pytest

from actors.pool import ActorDied, ActorPool, NoActorsLeft
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.protocols import PublishedWeights
from ray_rl.weight_manifest import Probe, WeightTransferError
from tests.fakes import collected, prompt


async def make_probe() -> Probe:
    return Probe(token_ids=(1, 2), logprobs=(-1.0,))


def version(number: int) -> PublishedWeights:
    return PublishedWeights(version=number, payload=None, probe=make_probe)


class Actor:
    """A pretended rollout actor: answers after `seconds`, dies on demand."""

    def __init__(self, index: int, seconds: float = 0.0) -> None:
        self.index = index
        self.name = f"actor {index}"
        self.seconds = seconds
        self.alive = True
        self.served: list[int] = []
        self.discarded: list[int] = []
        self.difference: float | None = 1e-7
        self.pause = 0.0

    async def _work(self) -> None:
        await asyncio.sleep(self.seconds)
        if not self.alive:
            raise ActorDied(f"{self.name} is gone")

    async def start(self) -> None:
        await self._work()

    async def collect(self, prompt):
        await self._work()
        self.served.append(prompt.position)
        return collected(prompt.position, version=0)

    async def evaluate(self, prompt, samples, temperature):
        await self._work()
        return ()

    async def receive_weights(self, weights: PublishedWeights) -> float:
        await self._work()
        return self.pause

    async def prove_weights(self, probe: Probe) -> float:
        await self._work()
        if self.difference is None:
            raise WeightTransferError("probe")
        return self.difference

    async def take_underfull(self) -> float:
        await self._work()
        return float(self.index)

    async def discard_weights(self, version: int) -> None:
        await self._work()
        self.discarded.append(version)

    async def shutdown(self) -> None:
        self.alive = False


def make_pool(actors: list[Actor], **changes) -> ActorPool:
    limits = {"groups_in_flight": 2, "start_timeout": 1, "group_timeout": 1, "publish_timeout": 1} | changes
    return ActorPool(lambda index: actors[index], len(actors), **limits)


async def test_load_and_not_turn_decides():
    slow, fast = Actor(0, seconds=0.2), Actor(1, seconds=0.001)
    pool = make_pool([slow, fast])
    first = asyncio.create_task(pool.collect(prompt(0)))
    await asyncio.sleep(0)
    for position in range(1, 6):
        await pool.collect(prompt(position))
    await first
    assert slow.served == [0]
    assert fast.served == [1, 2, 3, 4, 5]


async def test_a_dead_actors_prompt_goes_to_another_one():
    actors = [Actor(0), Actor(1)]
    pool = make_pool(actors)
    actors[0].alive = False
    groups = [await pool.collect(prompt(position)) for position in range(3)]
    assert [group.prompt.position for group in groups] == [0, 1, 2]
    assert actors[1].served == [0, 1, 2]
    assert pool.capacity == 2


async def test_no_actor_left_is_said_and_not_waited_for():
    actors = [Actor(0)]
    pool = make_pool(actors)
    actors[0].alive = False
    with pytest.raises(NoActorsLeft):
        await pool.collect(prompt(0))


async def test_every_wait_has_a_deadline_that_names_what():
    pool = make_pool([Actor(0, seconds=5)], group_timeout=0.01, start_timeout=0.01)
    with pytest.raises(DeadlineExceeded, match="actor 0 to load its engine"):
        await pool.start()
    with pytest.raises(DeadlineExceeded, match=r"group of prompt 7:p7 from actor 0"):
        await pool.collect(prompt(7))


async def test_publication_reports_the_worst_probe_and_pause_and_discards_the_files():
    actors = [Actor(0), Actor(1)]
    actors[1].difference, actors[0].pause = 3e-6, 0.25
    metrics = await make_pool(actors).publish(version(4))
    assert metrics["weights/probe_max_abs_diff"] == 3e-6
    assert metrics["timing/pause"] == 0.25
    assert [actor.discarded for actor in actors] == [[4], [4]]


async def test_a_failed_proof_stops_the_publication_and_still_discards_the_files():
    actors = [Actor(0), Actor(1)]
    actors[0].difference = None
    with pytest.raises(WeightTransferError):
        await make_pool(actors).publish(version(4))
    assert [actor.discarded for actor in actors] == [[4], [4]]


async def test_an_actor_that_dies_while_weights_arrive_is_left_out():
    actors = [Actor(0), Actor(1)]
    pool = make_pool(actors)
    actors[0].alive = False
    await pool.publish(version(1))
    await pool.collect(prompt(0))
    assert actors[1].served == [0]


async def test_the_time_of_underfull_batches_is_averaged_over_engines():
    assert (await make_pool([Actor(0), Actor(1)]).publish(version(1)))["timing/engines_underfull"] == 0.5


async def test_an_engine_without_groups_counts_as_idle_until_it_gets_one(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("actors.pool.time", SimpleNamespace(monotonic=lambda: clock))
    actors = [Actor(0, seconds=0.01), Actor(1)]
    pool = make_pool(actors)

    async def idle() -> float:
        return (await pool.publish(version(1)))["timing/engines_idle"]

    clock = 104.0
    assert await idle() == 4.0  # both, all the time
    clock = 105.0
    group = asyncio.create_task(pool.collect(prompt(0)))
    await asyncio.sleep(0)
    clock = 109.0
    assert await idle() == (1.0 + 5.0) / 2  # the first one worked from 105 on
    await group
    clock = 111.0
    assert await idle() == (2.0 + 2.0) / 2
