"""The pool while everything happens to its actors, at random but the same for each seed."""

import asyncio
from random import Random

import pytest

from actors.pool import ActorPool
from ray_rl.protocols import CollectedGroup, LearnerDied, NoActorsLeft, PromptFailed
from ray_rl.weight_manifest import WeightTransferError
from tests.actors.pretended import Actor, Actors, making, running, states, until
from tests.fakes import prompt

PROMPTS = 300
AT_ONCE = 20


class Fire:
    """Does something to the pool or to its actors every millisecond or two."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.version = 0
        self.deeds: set[str] = set()

    def prepare(self, actor: Actor) -> None:
        actor.seconds = self.random.uniform(0, 0.004)
        actor.home = self.random.choice(["here", "there"])
        if actor.index >= 3:  # the pool's start is not what is tested
            actor.start_error = OSError("no such device") if self.random.random() < 0.1 else None
            actor.receive_error = WeightTransferError("digest") if self.random.random() < 0.1 else None
            actor.prove_error = WeightTransferError("probe") if self.random.random() < 0.1 else None

    async def burn(self, pool: ActorPool, actors: Actors) -> None:
        while True:
            deed = self.random.choice(
                ["kill", "kill", "hang", "distrust", "resize", "publish", "publish", "dead learner"]
            )
            living = [actor for actor in actors.made if not actor.ended]
            victim = self.random.choice(living) if living else None
            self.deeds.add(deed)
            if deed == "resize":
                pool.resize(self.random.randint(1, 5))
            elif deed in ("publish", "dead learner"):
                await self.publish(pool, dies=deed == "dead learner")
            elif victim and deed == "kill":
                victim.kill()
            elif victim and deed == "hang":
                victim.hangs = True
            elif victim:
                victim.error = WeightTransferError("this engine does not serve")
            await asyncio.sleep(self.random.uniform(0, 0.003))

    async def publish(self, pool: ActorPool, *, dies: bool = False) -> None:
        self.version += 1
        homes = self.random.choice([None, frozenset({"here"}), frozenset()])

        async def make(receivers):
            await asyncio.sleep(0.001)
            if dies:
                raise LearnerDied("rank 0 is gone")
            return await making(self.version, homes=homes)(receivers)

        try:
            await pool.publish(make)
        except (WeightTransferError, LearnerDied, NoActorsLeft):
            self.deeds.add("a failed publication")


@pytest.mark.parametrize("seed", range(8))
async def test_each_prompt_gives_a_group_or_fails_by_name_and_no_place_is_lost(seed):
    fire = Fire(seed)
    limits = {"group_timeout": 0.05, "publish_timeout": 0.05, "max_attempts": 4, "outage_timeout": 5}
    async with running(3, fire.prepare, **limits) as (pool, actors, _):
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(position: int) -> CollectedGroup | PromptFailed:
            async with turns:
                try:
                    return await pool.collect(prompt(position))
                except PromptFailed as failure:
                    return failure

        burning = asyncio.create_task(fire.burn(pool, actors))
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*(one(position) for position in range(PROMPTS)))
        burning.cancel()
        await asyncio.wait({burning})

        groups = [outcome for outcome in outcomes if isinstance(outcome, CollectedGroup)]
        assert len(groups) > PROMPTS / 2
        for position, outcome in enumerate(outcomes):
            if isinstance(outcome, CollectedGroup):
                assert outcome.prompt.position == position
            else:
                assert f"prompt {position}:p{position} " in str(outcome)
        assert len(fire.deeds) >= 6

        await all_places_are_there(pool, actors, fire)


async def all_places_are_there(pool: ActorPool, actors: Actors, fire: Fire) -> None:
    """New actors get as many groups at once as they may, and no more."""
    actors.prepare = lambda actor: setattr(actor, "seconds", 0.005)
    old = list(actors.made)
    for actor in old:
        actor.kill()
    pool.resize(2)
    await fire.publish(pool)
    await until(lambda: all(actor.ended for actor in old) and "starting" not in states(pool))
    await pool.publish(making(fire.version + 1))
    await until(lambda: states(pool) == ["serving"] * 2)
    await asyncio.gather(*(pool.collect(prompt(position)) for position in range(8)))
    assert [actor.most_at_once for actor in actors.made if not actor.ended] == [2, 2]
    assert all(status.groups == 0 for status in pool.status())
