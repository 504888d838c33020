"""New weights on their way into pretended actors, while these work, die and join."""

import asyncio

import pytest

from actors.pool import ActorDied, WeightsGone
from ray_rl.protocols import LearnerDied, NoActorsLeft
from ray_rl.weight_manifest import WeightTransferError
from tests.actors.pretended import Actor, making, running, states, until, weights
from tests.fakes import prompt


async def test_a_publication_reports_the_worst_probe_and_pause_and_who_serves():
    async with running(2) as (pool, actors, _):
        actors[1].difference, actors[0].pause = 3e-6, 0.25
        metrics = await pool.publish(making(4))
        assert metrics["weights/probe_max_abs_diff"] == 3e-6
        assert metrics["timing/pause"] == 0.25
        assert metrics["timing/engines_underfull"] == 0.5
        assert (metrics["pool/actors"], metrics["pool/died"]) == (2, 0)


async def test_deaths_are_counted_from_one_publication_to_the_next():
    async with running(2) as (pool, actors, _):
        actors[0].kill()
        await pool.collect(prompt(0))
        await until(lambda: states(pool) == ["serving"] * 2)
        assert (await pool.publish(making(1)))["pool/died"] == 1
        assert (await pool.publish(making(2)))["pool/died"] == 0


async def test_the_learner_is_told_who_receives():
    homes = []

    async with running(2) as (pool, actors, _):
        actors[1].home = "there"

        async def make(receivers):
            homes.extend((receiver.home, receiver.handle.index) for receiver in receivers)
            return weights(1)

        await pool.publish(make)
    assert homes == [("here", 0), ("there", 1)]


async def test_before_the_first_publication_nobody_works():
    async with running(1, published=False) as (pool, _, _):
        group = asyncio.create_task(pool.collect(prompt(0)))
        await asyncio.sleep(0.01)
        assert states(pool) == ["waiting for weights"]
        assert pool.waits_for_weights
        await pool.publish(making(0))
        await group


async def test_work_in_flight_goes_on_during_a_publication():
    async with running(1) as (pool, actors, _):
        actors[0].seconds = 0.02
        group = asyncio.create_task(pool.collect(prompt(0)))
        await until(lambda: actors[0].begun == [0])
        await pool.publish(making(1))
        assert (await group).prompt.position == 0
        assert actors[0].begun == [0]


async def test_an_actor_that_dies_while_weights_arrive_is_replaced():
    async with running(2) as (pool, actors, _):
        actors[0].kill()
        metrics = await pool.publish(making(1))
        assert (metrics["pool/actors"], metrics["pool/died"]) == (1, 1)
        await until(lambda: states(pool) == ["serving"] * 2)
        assert actors[2].received == [1]


async def test_an_actor_that_hangs_while_weights_arrive_is_replaced():
    async with running(2, publish_timeout=0.05) as (pool, actors, warnings):

        async def hang(weights):
            await asyncio.Event().wait()

        actors[0].receive_weights = hang
        await pool.publish(making(1))
        assert "waited 0.05 s for policy version 1 to reach actor 0" in warnings[0]
        await until(lambda: states(pool) == ["serving"] * 2)


async def test_an_actor_that_fails_its_proof_is_replaced_and_its_groups_are_made_anew():
    async with running(2) as (pool, actors, _):
        actors[0].seconds = 60
        group = asyncio.create_task(pool.collect(prompt(0)))
        await until(lambda: actors[0].begun == [0])
        actors[0].prove_error = WeightTransferError("the engine computes with something else")
        await pool.publish(making(1))
        assert (await group).prompt.position == 0
        assert actors[0].ended
        assert actors[0].served == []


async def test_an_actor_that_distrusts_its_engine_while_it_works_is_replaced():
    async with running(1) as (pool, actors, _):
        actors[0].error = WeightTransferError("this engine does not serve")
        await pool.collect(prompt(0))
        assert actors[1].served == [0]


@pytest.mark.parametrize("error", [WeightTransferError("the probe differs"), OSError("the shared memory is full")])
async def test_a_failure_of_all_is_raised_and_the_pool_lives_on(error):
    async with running(2) as (pool, actors, _):
        for actor in actors.made:
            actor.prove_error = error
        with pytest.raises(type(error), match=str(error)):
            await pool.publish(making(1))
        await until(lambda: states(pool) == ["serving"] * 2)
        assert [actor.received for actor in actors.made[2:]] == [[0], [0]]  # what was proven last
        await pool.publish(making(1))


async def test_where_all_die_of_it_the_version_is_published_to_their_replacements():
    async with running(2) as (pool, actors, _):
        actors[0].kill()
        actors[1].kill()
        await pool.publish(making(3))
        await until(lambda: states(pool) == ["serving"] * 2)
        assert all(actor.received == [3] for actor in actors.made[2:])


async def test_weights_that_kill_every_engine_end_in_an_error():
    def deadly(actor: Actor) -> None:
        actor.receive_error = ActorDied("the engine's process is gone")

    async with running(1, deadly, published=False) as (pool, _, _):
        with pytest.raises(NoActorsLeft, match=r"3 times every rollout actor died of new weights.*actor 2"):
            await pool.publish(making(0))


async def test_a_publication_waits_for_an_actor_but_not_for_ever():
    async with running(1, outage_timeout=0.05) as (pool, actors, _):
        actors.prepare = lambda actor: actor.loads.clear()
        actors[0].kill()
        with pytest.raises(NoActorsLeft, match="outage_timeout"):
            await pool.publish(making(1))
        publication = asyncio.create_task(pool.publish(making(1)))
        actors[1].loads.set()
        await publication
        assert actors[1].received == [1]


async def test_a_learner_that_dies_leaves_the_last_weights_for_those_that_join():
    async def dead_learner(receivers):
        raise LearnerDied("rank 0 is gone")

    async with running(1) as (pool, actors, _):
        await pool.publish(making(5))
        with pytest.raises(LearnerDied):
            await pool.publish(dead_learner)
        actors[0].kill()
        await pool.collect(prompt(0))
        assert actors[1].received == [5]


async def test_a_learner_that_dies_before_the_proof_replaces_nobody():
    async def dead_learner():
        raise LearnerDied("rank 0 is gone")

    async with running(1) as (pool, _, _):
        with pytest.raises(LearnerDied):
            await pool.publish(making(1, probe=dead_learner))
        assert (pool.died, states(pool)) == (0, ["serving"])


async def test_who_joins_where_the_weights_do_not_lie_waits_for_the_next_publication():
    async with running(1) as (pool, actors, _):
        await pool.publish(making(1, homes=frozenset({"here"})))
        actors.prepare = lambda actor: setattr(actor, "home", "there")
        pool.resize(2)
        await until(lambda: states(pool) == ["serving", "waiting for weights"])
        assert pool.waits_for_weights
        await pool.publish(making(2, homes=frozenset({"here", "there"})))
        assert not pool.waits_for_weights
        assert states(pool) == ["serving", "serving"]
        assert actors[1].received == [2]


async def test_who_finds_the_weights_gone_waits_for_the_next_publication_and_is_not_replaced():
    async with running(1) as (pool, actors, _):
        actors.prepare = lambda actor: setattr(actor, "receive_error", WeightsGone("the file is gone"))
        pool.resize(2)
        await until(lambda: pool.waits_for_weights)
        actors[1].receive_error = None
        await pool.publish(making(1))
        assert (pool.died, states(pool)) == (0, ["serving"] * 2)


async def test_who_fails_to_join_is_replaced():
    def first_is_broken(actor: Actor) -> None:
        if actor.index == 1:
            actor.prove_error = WeightTransferError("the probe differs")

    async with running(1) as (pool, actors, _):
        actors.prepare = first_is_broken
        pool.resize(2)
        await until(lambda: states(pool) == ["serving"] * 2)
        assert [actor.proven for actor in actors.made] == [True, False, True]


async def test_who_loads_during_a_publication_joins_after_it():
    async with running(1) as (pool, actors, _):
        goes_on = asyncio.Event()

        async def make(receivers):
            pool.resize(2)
            await until(lambda: "waiting for weights" in states(pool))
            await goes_on.wait()
            return weights(1)

        publication = asyncio.create_task(pool.publish(make))
        await until(lambda: "waiting for weights" in states(pool))
        await asyncio.sleep(0.01)
        assert actors[1].received == []
        goes_on.set()
        await publication
        await until(lambda: states(pool) == ["serving"] * 2)
        assert actors[1].received == [1]


async def test_a_publication_waits_for_those_that_are_just_joining():
    async with running(1) as (pool, actors, _):
        actors.prepare = lambda actor: setattr(actor, "receive_weights", hold)
        release, order = asyncio.Event(), []

        async def hold(weights):
            await release.wait()
            order.append("joined")
            return 0.0

        async def make(receivers):
            order.append("made")
            return weights(1)

        pool.resize(2)
        await until(lambda: states(pool) == ["serving", "waiting for weights"])
        await asyncio.sleep(0.01)
        publication = asyncio.create_task(pool.publish(make))
        await asyncio.sleep(0.01)
        assert order == []
        release.set()
        await publication
        assert order[:2] == ["joined", "made"]


async def test_two_publications_at_once_are_refused():
    async with running(1) as (pool, _, _):
        first = asyncio.create_task(pool.publish(making(1)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="two publications"):
            await pool.publish(making(2))
        await first
