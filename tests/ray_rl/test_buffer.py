import asyncio

import pytest

from ray_rl.buffer import StalenessBuffer
from tests.fakes import collected


async def test_strictly_on_policy_admits_one_batch_until_it_is_published():
    buffer = StalenessBuffer(batch=2, max_staleness=0)
    for position in range(2):
        await buffer.admit()
        await buffer.put(collected(position, version=0))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)
    assert len(await buffer.take(version=0)) == 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)
    await buffer.release(2)
    await asyncio.wait_for(buffer.admit(), 0.01)


async def test_staleness_one_admits_two_batches():
    buffer = StalenessBuffer(batch=2, max_staleness=1)
    for _ in range(4):
        await asyncio.wait_for(buffer.admit(), 0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)


async def test_groups_older_than_allowed_are_dropped_counted_and_make_room():
    buffer = StalenessBuffer(batch=1, max_staleness=1)
    for position, version in ((0, 0), (1, 2)):
        await buffer.admit()
        await buffer.put(collected(position, version=version))
    taken = await buffer.take(version=3)
    assert [group.prompt.position for group in taken] == [1]
    assert buffer.dropped == {"stale": 1}
    await asyncio.wait_for(buffer.admit(), 0.01)


async def test_take_waits_for_a_whole_batch():
    buffer = StalenessBuffer(batch=2, max_staleness=0)
    await buffer.admit()
    await buffer.put(collected(0, version=0))
    take = asyncio.create_task(buffer.take(version=0))
    await asyncio.sleep(0.01)
    assert not take.done()
    await buffer.admit()
    await buffer.put(collected(1, version=0))
    assert len(await asyncio.wait_for(take, 0.1)) == 2
    assert buffer.depth == 0


async def test_no_more_is_admitted_than_the_run_will_train_on_but_for_what_was_dropped():
    buffer = StalenessBuffer(batch=1, max_staleness=1, total=2)
    for position, version in ((0, 0), (1, 2)):
        await buffer.admit()
        await buffer.put(collected(position, version=version))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)
    await buffer.take(version=3)
    await asyncio.wait_for(buffer.admit(), 0.01)
