"""The pool over pretended actors. Its numbers changing: test_pool_resize.py; everything at random: test_pool_under_fire.py."""

import asyncio
from types import SimpleNamespace

import pytest

from actors.pool import ActorDied, ActorPool, PoolLimits
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.protocols import NoActorsLeft, PromptFailed
from tests.actors.pretended import LIMITS, Actor, Actors, making, running, states, until
from tests.fakes import prompt


def slow(actor: Actor) -> None:
    actor.seconds = 0.02


async def test_load_and_not_turn_decides():
    async with running(2) as (pool, actors, _):
        actors[0].hangs = True
        first = asyncio.create_task(pool.collect(prompt(0)))
        await until(lambda: actors[0].begun == [0])
        for position in range(1, 6):
            await pool.collect(prompt(position))
        assert actors[1].served == [1, 2, 3, 4, 5]
        first.cancel()


async def test_an_actor_gets_as_many_groups_at_once_as_it_may():
    async with running(2, slow, groups_in_flight=3) as (pool, actors, _):
        groups = [asyncio.create_task(pool.collect(prompt(position))) for position in range(9)]
        await until(lambda: len(actors[0].begun + actors[1].begun) == 6)
        assert [status.groups for status in pool.status()] == [3, 3]
        await asyncio.gather(*groups)
        assert [status.groups for status in pool.status()] == [0, 0]
        assert sum(status.served for status in pool.status()) == 9


async def test_who_comes_first_is_served_first():
    async with running(1, slow, groups_in_flight=1) as (pool, actors, _):
        await asyncio.gather(*(pool.collect(prompt(position)) for position in range(5)))
        assert actors[0].served == [0, 1, 2, 3, 4]


async def test_small_requests_do_not_overtake_a_large_one_for_ever():
    async with running(1, slow, groups_in_flight=1) as (pool, _, _):
        ended: list[str] = []

        async def ask(name: str, samples: int) -> None:
            await pool.evaluate(prompt(0), samples=samples, temperature=0)
            ended.append(name)

        await asyncio.gather(ask("small", 1), ask("large", 16), ask("late", 1))
        assert ended == ["small", "large", "late"]


async def test_a_dead_actors_prompts_go_to_another_one_and_it_is_replaced():
    async with running(2, slow) as (pool, actors, warnings):
        groups = [asyncio.create_task(pool.collect(prompt(position))) for position in range(4)]
        await until(lambda: len(actors[0].begun) == 2)
        actors[0].kill()
        assert [group.prompt.position for group in await asyncio.gather(*groups)] == [0, 1, 2, 3]
        assert sorted(actors[1].served + [p for actor in actors.made[2:] for p in actor.served]) == [0, 1, 2, 3]
        await until(lambda: states(pool) == ["serving"] * 2)
        assert (pool.size, pool.died) == (2, 1)
        assert actors[0].ended
        assert warnings == ["actor 0 is lost; its prompts go to others: actor 0 is gone"]


async def test_a_replacement_has_the_current_weights_proven_before_it_gets_work():
    async with running(1) as (pool, actors, _):
        await pool.publish(making(7))
        actors[0].kill()
        group = await pool.collect(prompt(0))
        assert actors[1].received == [7]
        assert actors[1].proven
        assert group.summary.newest_version == 7


async def test_an_actor_that_hangs_is_replaced_and_what_else_it_had_does_not_wait():
    async with running(1, group_timeout=0.05) as (pool, actors, warnings):
        actors[0].hangs = True
        first = asyncio.create_task(pool.collect(prompt(0)))
        await asyncio.sleep(0.03)
        second = asyncio.create_task(pool.collect(prompt(1)))
        await asyncio.gather(first, second)
        assert actors[0].begun == [0, 1]
        assert sorted(actors[1].served) == [0, 1]
        assert "waited 0.05 s for the group of prompt 0:p0 from actor 0" in warnings[0]


async def test_other_errors_of_an_actor_come_as_they_are_and_free_the_place():
    async with running(1, groups_in_flight=1) as (pool, actors, _):
        actors[0].error = ValueError("a prompt that is too long")
        with pytest.raises(ValueError, match="too long"):
            await pool.collect(prompt(0))
        actors[0].error = None
        await pool.collect(prompt(1))
        assert pool.died == 0


async def test_a_prompt_that_costs_too_many_actors_fails_by_name():
    def deadly(actor: Actor) -> None:
        actor.error = ActorDied("the engine's process is gone")

    async with running(1, deadly) as (pool, _, _):
        with pytest.raises(PromptFailed, match=r"prompt 3:p3 was in 3 .*actor 0: the engine.*actor 1.*actor 2"):
            await pool.collect(prompt(3))
        assert pool.died == 3


async def test_without_any_actor_work_waits_and_goes_on_when_one_is_back():
    async with running(1) as (pool, actors, warnings):
        actors.prepare = lambda actor: actor.loads.clear()
        group = asyncio.create_task(pool.collect(prompt(0)))
        actors[0].kill()
        await until(lambda: len(actors.made) == 2)
        assert not group.done()
        actors[1].loads.set()
        assert (await group).prompt.position == 0
        assert warnings[1:] == [
            "no rollout actor is left; waiting up to 5 s for one to start",
            "actor 1 serves again",
        ]


async def test_an_outage_that_lasts_is_told_to_all_who_wait_or_come_and_ends_when_one_is_back():
    async with running(1, outage_timeout=0.05) as (pool, actors, _):
        actors.prepare = lambda actor: actor.loads.clear()
        actors[0].kill()
        waiting = [asyncio.create_task(pool.collect(prompt(position))) for position in range(3)]
        for one in waiting:
            with pytest.raises(NoActorsLeft, match=r"rollout.outage_timeout: for 0.05 s .*actor 0: actor 0 is gone"):
                await one
        with pytest.raises(NoActorsLeft):
            await pool.collect(prompt(3))
        actors[1].loads.set()
        await until(lambda: states(pool) == ["serving"])
        await pool.collect(prompt(4))


async def test_an_actor_that_cannot_start_is_tried_again():
    async with running(1) as (pool, actors, warnings):

        def twice_broken(actor: Actor) -> None:
            if actor.index < 3:
                actor.start_error = RuntimeError("long\ntraceback\nOSError: no such device")

        actors.prepare = twice_broken
        actors[0].kill()
        await pool.collect(prompt(0))
        assert actors[3].served == [0]
        assert "actor 2 did not come up, and another one is tried: OSError: no such device" in warnings


async def test_a_factory_that_fails_is_asked_again():
    async with running(1) as (pool, actors, warnings):

        def fails_once(actor: Actor) -> None:
            if actor.index == 1:
                raise OSError("no more processes")

        actors.prepare = fails_once
        actors[0].kill()
        await pool.collect(prompt(0))
        assert actors[2].served == [0]
        assert "no rollout actor could be made: no more processes" in warnings


async def test_cancelled_work_frees_its_place():
    async with running(1, groups_in_flight=1) as (pool, actors, _):
        actors[0].hangs = True
        hanging = asyncio.create_task(pool.collect(prompt(0)))
        await until(lambda: actors[0].begun == [0])
        waiting = asyncio.create_task(pool.collect(prompt(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        actors[0].hangs = False
        hanging.cancel()
        await pool.collect(prompt(2))
        assert actors[0].served == [2]
        assert pool.died == 0


async def test_a_place_that_is_handed_to_someone_who_is_cancelled_is_not_lost():
    async with running(1, slow, groups_in_flight=1) as (pool, actors, _):
        first = asyncio.create_task(pool.collect(prompt(0)))
        second = asyncio.create_task(pool.collect(prompt(1)))
        first.add_done_callback(lambda _: second.cancel())
        await asyncio.wait({first, second})
        await pool.collect(prompt(2))
        assert actors[0].served[-1] == 2


async def test_the_first_actor_that_cannot_start_is_said_and_all_are_ended():
    def broken(actor: Actor) -> None:
        if actor.index == 1:
            actor.start_error = ValueError("no such model")
        else:
            actor.loads.clear()

    actors = Actors(broken)
    with pytest.raises(ValueError, match="no such model"):
        await ActorPool(actors, 3, limits=PoolLimits(**LIMITS)).start()
    assert [actor.ended for actor in actors.made] == [True] * 3


async def test_a_start_that_takes_too_long_names_the_actor():
    actors = Actors(lambda actor: actor.loads.clear())
    with pytest.raises(DeadlineExceeded, match="actor 0 to load its engine"):
        await ActorPool(actors, 1, limits=PoolLimits(**LIMITS | {"start_timeout": 0.01})).start()


async def test_without_a_learner_actors_serve_what_they_loaded():
    async with running(1, published=False, serves_loaded=True) as (pool, actors, _):
        await pool.evaluate(prompt(0), samples=1, temperature=0)
        assert not pool.waits_for_weights
        actors[0].kill()
        await pool.collect(prompt(0))
        assert actors[1].served == [0]


async def test_after_the_end_nobody_waits():
    async with running(1) as (pool, actors, _):
        actors[0].hangs = True
        working, waiting = (asyncio.create_task(pool.collect(prompt(p))) for p in (0, 1))
        await until(lambda: len(actors[0].begun) == 2)
        await pool.shutdown()
        await pool.shutdown()
        for task in (working, waiting):
            with pytest.raises(NoActorsLeft, match="shut down"):
                await task
        with pytest.raises(NoActorsLeft, match="shut down"):
            await pool.publish(making(1))


async def test_stacks_are_told_by_all_who_can(monkeypatch):
    async with running(2) as (pool, actors, _):
        actors[1].kill()
        assert await pool.stacks() == {"actor 0": "stacks of actor 0", "actor 1": "no answer: actor 1 is gone"}


async def test_an_engine_without_groups_counts_as_idle_until_it_gets_one(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("actors.pool_member.time", SimpleNamespace(monotonic=lambda: clock))
    async with running(2) as (pool, actors, _):

        async def idle() -> float:
            return (await pool.publish(making(1)))["timing/engines_idle"]

        clock = 104.0
        assert await idle() == 4.0  # both, all the time
        clock = 105.0
        actors[0].seconds = 0.01
        group = asyncio.create_task(pool.collect(prompt(0)))
        await asyncio.sleep(0)
        clock = 109.0
        assert await idle() == (1.0 + 5.0) / 2  # the first one worked from 105 on
        await group
        clock = 111.0
        assert await idle() == (2.0 + 2.0) / 2


async def test_a_prompt_that_kills_its_actors_takes_no_other_prompt_with_it():
    async with running(1, groups_in_flight=4, max_attempts=2) as (pool, actors, _):

        def fatal(actor: Actor) -> None:
            actor.fatal = {0}

        actors.prepare = fatal
        fatal(actors[0])
        groups = await asyncio.gather(*(pool.collect(prompt(p)) for p in range(4)), return_exceptions=True)
        assert isinstance(groups[0], PromptFailed)
        assert [group.prompt.position for group in groups[1:]] == [1, 2, 3]
