import asyncio

import pytest

from ray_rl.buffer import Batch, StalenessBuffer
from tests.fakes import collected

EQUAL, UNEQUAL = (1.0, 1.0), (0.0, 1.0)


async def fill(buffer: StalenessBuffer, *rewards: tuple[float, float], first: int = 0, version: int = 0) -> None:
    for position, of_group in enumerate(rewards, start=first):
        await asyncio.wait_for(buffer.admit(), 0.1)
        await buffer.put(collected(position, version=version, rewards=of_group))


async def admits_nothing(buffer: StalenessBuffer) -> bool:
    try:
        await asyncio.wait_for(buffer.admit(), 0.01)
    except TimeoutError:
        return True
    return False


def positions(batch: Batch) -> tuple[list[int], list[int]]:
    return [group.prompt.position for group in batch.groups], [summary.position for summary in batch.filtered]


async def test_strictly_on_policy_admits_one_batch_until_it_is_published():
    buffer = StalenessBuffer(batch=2, max_staleness=0)
    for position in range(2):
        await buffer.admit()
        await buffer.put(collected(position, version=0))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)
    assert len((await buffer.take(version=0)).groups) == 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.01)
    await buffer.release()
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
    assert [group.prompt.position for group in taken.groups] == [1]
    assert [summary.position for summary in taken.stale] == [0]
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
    assert len((await asyncio.wait_for(take, 0.1)).groups) == 2
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


async def test_decided_groups_are_kept_unless_asked_otherwise():
    buffer = StalenessBuffer(batch=2, max_staleness=0)
    await fill(buffer, EQUAL, UNEQUAL)
    assert positions(await buffer.take(version=0)) == ([0, 1], [])
    assert not buffer.dropped


async def test_drop_takes_decided_groups_out_of_their_batch_and_replaces_none():
    dropped: list[tuple[int, str]] = []
    note = lambda position, reason: dropped.append((position, reason))  # noqa: E731
    buffer = StalenessBuffer(batch=3, max_staleness=0, total=6, decided="drop", on_drop=note)
    await fill(buffer, UNEQUAL, EQUAL, UNEQUAL)
    assert positions(await buffer.take(version=0)) == ([0, 2], [1])
    assert (buffer.dropped, dropped) == ({"decided": 1}, [(1, "decided")])
    assert await admits_nothing(buffer)
    await buffer.release()
    await fill(buffer, EQUAL, EQUAL, EQUAL, first=3, version=1)
    assert positions(await buffer.take(version=1)) == ([], [3, 4, 5])
    await buffer.release()
    assert await admits_nothing(buffer)


async def test_refill_samples_another_group_for_each_decided_one_before_the_batch_is_taken():
    buffer = StalenessBuffer(batch=2, max_staleness=0, total=2, decided="refill", refill_limit=3)
    await fill(buffer, EQUAL, UNEQUAL, EQUAL, UNEQUAL)
    assert await admits_nothing(buffer)
    assert positions(await buffer.take(version=0)) == ([1, 3], [0, 2])
    assert buffer.dropped == {"decided": 2}
    await buffer.release()
    assert await admits_nothing(buffer)


async def test_past_the_refill_limit_decided_groups_are_accepted():
    buffer = StalenessBuffer(batch=2, max_staleness=0, decided="refill", refill_limit=2.5)
    await fill(buffer, *[EQUAL] * 5)
    assert await admits_nothing(buffer)
    assert positions(await buffer.take(version=0)) == ([3, 4], [0, 1, 2])


async def test_a_refill_limit_of_one_keeps_decided_groups():
    buffer = StalenessBuffer(batch=2, max_staleness=0, decided="refill", refill_limit=1)
    await fill(buffer, EQUAL, EQUAL)
    assert positions(await buffer.take(version=0)) == ([0, 1], [])


async def test_the_refill_limit_holds_for_each_of_several_batches_in_flight():
    buffer = StalenessBuffer(batch=2, max_staleness=2, decided="refill", refill_limit=2)
    await fill(buffer, *[EQUAL] * 12)
    assert (buffer.depth, buffer.dropped) == (6, {"decided": 6})
    assert await admits_nothing(buffer)
    assert positions(await buffer.take(version=0)) == ([2, 3], [0, 1, 4, 5, 8, 9])
    await buffer.release()
    await fill(buffer, *[EQUAL] * 4, first=12)
    assert positions(await buffer.take(version=1)) == ([6, 7], [12, 13])


async def test_what_was_dropped_is_told_with_the_next_batch_and_only_once():
    buffer = StalenessBuffer(batch=1, max_staleness=1, decided="refill", refill_limit=2)
    await fill(buffer, UNEQUAL, EQUAL, UNEQUAL)
    assert positions(await buffer.take(version=0)) == ([0], [1])
    await buffer.release()
    await fill(buffer, UNEQUAL, first=3, version=2)
    batch = await buffer.take(version=2)
    assert positions(batch) == ([3], [])
    assert [summary.position for summary in batch.stale] == [2]
    assert buffer.dropped == {"decided": 1, "stale": 1}


async def test_a_batch_that_was_not_trained_goes_first_again_and_its_lost_groups_are_replaced():
    buffer = StalenessBuffer(batch=2, max_staleness=1, total=4)
    await fill(buffer, UNEQUAL, UNEQUAL, UNEQUAL)
    batch = await buffer.take(version=0)
    await buffer.give_back(batch, lost=[1])
    assert positions(await buffer.take(version=0)) == ([0, 2], [])
    await buffer.release()
    await fill(buffer, UNEQUAL, UNEQUAL, first=3)
    assert await admits_nothing(buffer)


async def test_what_was_dropped_from_a_batch_in_vain_is_told_with_the_next_one():
    buffer = StalenessBuffer(batch=2, max_staleness=0, decided="drop")
    await fill(buffer, EQUAL, UNEQUAL)
    await buffer.give_back(await buffer.take(version=0))
    await fill(buffer, UNEQUAL, first=2)
    assert positions(await buffer.take(version=0)) == ([1, 2], [0])


async def test_undone_versions_leave_and_their_steps_are_wanted_again():
    buffer = StalenessBuffer(batch=1, max_staleness=2, total=4)
    for position, version in ((0, 1), (1, 2), (2, 3)):
        await buffer.admit()
        await buffer.put(collected(position, version=version))
    await buffer.take(version=1)
    await buffer.release()
    assert await buffer.undo(version=2, steps=1) == (2,)
    assert buffer.depth == 1
    await asyncio.wait_for(buffer.admit(), 0.1)  # for the one that left
    await asyncio.wait_for(buffer.admit(), 0.1)  # one of two: the last of the run, and the step that is done again
    assert await admits_nothing(buffer)


async def test_a_group_of_an_undone_version_is_refused_until_that_version_is_published_again():
    buffer = StalenessBuffer(batch=1, max_staleness=0, total=1)
    buffer.expect(1)
    await buffer.admit()
    assert not await buffer.put(collected(0, version=2))
    await buffer.admit()
    assert await buffer.put(collected(0, version=1))


async def test_what_was_begun_before_an_undo_never_counts_as_the_version_that_bears_its_number_later():
    buffer = StalenessBuffer(batch=1, max_staleness=3, total=4)
    before = await buffer.admit()
    buffer.expect(2)
    await buffer.undo(version=1, steps=1)
    amid = await buffer.admit()
    buffer.forget(1)  # version 1 is published again
    after = await buffer.admit()
    buffer.expect(2)
    assert not await buffer.put(collected(0, version=2), before)
    assert not await buffer.put(collected(1, version=2), amid)
    assert await buffer.put(collected(2, version=2), after)


async def test_a_prompt_that_is_given_up_makes_room_for_another():
    buffer = StalenessBuffer(batch=1, max_staleness=0, total=1)
    await buffer.admit()
    assert await admits_nothing(buffer)
    await buffer.give_up()
    await asyncio.wait_for(buffer.admit(), 0.1)


async def test_a_batch_is_in_the_order_of_the_stream_however_it_came():
    buffer = StalenessBuffer(batch=3, max_staleness=0)
    for position in (2, 0, 1):
        await buffer.admit()
        await buffer.put(collected(position, version=0))
    assert positions(await buffer.take(version=0)) == ([0, 1, 2], [])
