import asyncio
import time

import pytest

from benchmarks.plan.virtual_time import Deadlock, TooLong, run_in_virtual_time
from ray_rl.deadlines import DeadlineExceeded, in_thread, wait

DAY = 86400.0


def run(main):
    return run_in_virtual_time(main, most_seconds=10 * DAY)


def test_sleeps_end_in_the_order_of_their_moments_and_take_no_time():
    ended = []

    async def sleeper(seconds):
        await asyncio.sleep(seconds)
        ended.append((seconds, time.monotonic(), asyncio.get_running_loop().time()))

    async def main():
        await asyncio.gather(*(sleeper(seconds) for seconds in (DAY, 1.5, 3600.0, 0.0)))

    started = time.monotonic()
    run(main())
    assert time.monotonic() - started < 5
    assert ended == [(0.0, 0.0, 0.0), (1.5, 1.5, 1.5), (3600.0, 3600.0, 3600.0), (DAY, DAY, DAY)]


def test_the_clock_stands_while_code_runs_and_is_the_real_one_again_afterwards():
    async def main():
        before = time.monotonic()
        time.sleep(0.02)
        return time.monotonic() - before

    before = time.monotonic()
    assert run(main()) == 0
    assert time.monotonic() - before >= 0.02


def test_a_deadline_passes_when_its_moment_comes():
    async def main():
        with pytest.raises(DeadlineExceeded, match="waited 3600 s for a group"):
            await wait(asyncio.sleep(2 * 3600), 3600, what="a group")
        return time.monotonic()

    assert run(main()) == 3600


def test_tasks_that_wait_for_each_other_are_told_of():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="nothing is ready"):
        run(main())


def test_what_goes_on_for_ever_is_given_up():
    async def main():
        while True:
            await asyncio.sleep(1)

    with pytest.raises(TooLong, match="not done after 101 s"):
        run_in_virtual_time(main(), most_seconds=100)


def test_time_stands_until_a_thread_is_done():
    async def main():
        found = await in_thread(lambda: time.sleep(0.05) or "done", 1e-3, what="a thread")
        return found, time.monotonic()

    assert run(main()) == ("done", 0)


def test_pools_of_threads_are_refused():
    async def main():
        await asyncio.to_thread(lambda: None)

    with pytest.raises(RuntimeError, match="in_thread"):
        run(main())
