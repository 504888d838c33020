"""More and fewer pretended actors while the pool works."""

import asyncio

import pytest

from actors.pool import ActorPool, PoolLimits
from tests.actors.pretended import LIMITS, Actor, Actors, making, running, states, until, weights
from tests.fakes import prompt


async def test_more_actors_get_the_weights_and_then_work():
    async with running(1) as (pool, actors, _):
        pool.resize(3)
        assert pool.size == 3
        await until(lambda: states(pool) == ["serving"] * 3)
        await asyncio.gather(*(pool.collect(prompt(position)) for position in range(6)))
        assert [len(actor.served) for actor in actors.made] == [2, 2, 2]


async def test_a_surplus_actor_ends_when_its_groups_are_done_and_gets_no_new_ones():
    async with running(2) as (pool, actors, _):
        for actor in actors.made:
            actor.seconds = 0.05
        groups = [asyncio.create_task(pool.collect(prompt(position))) for position in range(3)]
        await until(lambda: len(actors[0].begun + actors[1].begun) == 3)
        pool.resize(1)
        assert states(pool) == ["serving", "draining"]
        later = [asyncio.create_task(pool.collect(prompt(position))) for position in range(3, 6)]
        await asyncio.gather(*groups, *later)
        assert actors[1].served == [1]
        await until(lambda: actors[1].ended)
        assert (states(pool), pool.died) == (["serving"], 0)


async def test_an_idle_surplus_actor_ends_at_once():
    async with running(3) as (pool, actors, _):
        pool.resize(1)
        await until(lambda: sum(actor.ended for actor in actors.made) == 2)
        assert states(pool) == ["serving"]


async def test_those_that_only_start_go_first():
    async with running(1) as (pool, actors, _):
        actors.prepare = lambda actor: actor.loads.clear()
        pool.resize(3)
        await until(lambda: len(actors.made) == 3)
        actors[1].loads.set()
        await until(lambda: states(pool) == ["serving", "serving", "starting"])
        pool.resize(2)
        await until(lambda: actors[2].ended)
        assert states(pool) == ["serving", "serving"]


async def test_down_and_up_again():
    async with running(2) as (pool, actors, _):
        for actor in actors.made:
            actor.seconds = 0.05
        groups = [asyncio.create_task(pool.collect(prompt(position))) for position in range(4)]
        await until(lambda: len(actors[0].begun + actors[1].begun) == 4)
        pool.resize(1)
        pool.resize(2)
        await until(lambda: sorted(states(pool)) == ["draining", "serving", "serving"])
        await asyncio.gather(*groups)
        await until(lambda: states(pool) == ["serving", "serving"])
        assert pool.died == 0


async def test_a_draining_actor_that_dies_is_not_replaced_but_its_prompts_are_not_lost():
    async with running(2) as (pool, actors, _):
        for actor in actors.made:
            actor.seconds = 0.05
        groups = [asyncio.create_task(pool.collect(prompt(position))) for position in range(2)]
        await until(lambda: len(actors[0].begun + actors[1].begun) == 2)
        pool.resize(1)
        draining = next(a for a, status in zip(actors.made, pool.status(), strict=True) if status.state == "draining")
        draining.kill()
        assert len(await asyncio.gather(*groups)) == 2
        assert (states(pool), len(actors.made)) == (["serving"], 2)


@pytest.mark.parametrize("size", [1, 4])
async def test_the_number_may_change_while_weights_are_published(size):
    async with running(2) as (pool, actors, _):

        async def make(receivers):
            pool.resize(size)
            await asyncio.sleep(0.01)
            return weights(1)

        await pool.publish(make)
        await until(lambda: states(pool) == ["serving"] * size)
        assert all(actor.received[-1] == 1 for actor in actors.made if not actor.ended)
        assert pool.died == 0


async def test_a_place_that_waits_to_be_filled_again_can_be_dropped():
    def broken(actor: Actor) -> None:
        actor.start_error = OSError("no such device")

    async with running(1, restart_delay=60) as (pool, actors, _):
        actors.prepare = broken
        pool.resize(2)
        await until(lambda: pool.died == 1)
        pool.resize(1)
        await pool.publish(making(1))
        assert len(actors.made) == 2


async def test_an_actor_that_is_not_wanted_any_more_does_not_fail_the_start():
    def second_is_slow(actor: Actor) -> None:
        if actor.index == 1:
            actor.loads.clear()

    pool = ActorPool(Actors(second_is_slow), 2, limits=PoolLimits(**LIMITS))
    starting = asyncio.create_task(pool.start())
    await until(lambda: states(pool) == ["waiting for weights", "starting"])
    pool.resize(1)
    await starting
    assert states(pool) == ["waiting for weights"]
    await pool.shutdown()


async def test_no_pool_is_empty():
    async with running(1) as (pool, _, _):
        with pytest.raises(ValueError, match="at least one"):
            pool.resize(0)
