"""Waits end by their deadline, by their own error or by a cancellation, and are told apart."""

import asyncio
import re
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from ray_rl import deadlines
from ray_rl.deadlines import Deadline, DeadlineExceeded, call_within, end, first_of, in_thread, join, result, wait

LATE = r"waited 0\.01 s for it, and it did not come \(since \d\d:\d\d:\d\d\)"


async def forever() -> None:
    await asyncio.Event().wait()


async def test_the_error_names_what_how_long_since_when_and_why():
    with pytest.raises(DeadlineExceeded) as raised:
        await wait(forever(), 0.01, what="it", causes="a dead node; look at ray status")
    assert re.fullmatch(LATE + "; likely: a dead node; look at ray status", str(raised.value))


async def test_what_comes_in_time_is_the_result():
    assert await wait(asyncio.sleep(0, "here"), 5, what="it") == "here"


async def test_what_is_there_already_needs_no_time():
    future = asyncio.get_running_loop().create_future()
    future.set_result(7)
    assert await wait(future, 0, what="it") == 7


async def test_what_is_late_is_cancelled():
    task = asyncio.create_task(forever())
    with pytest.raises(DeadlineExceeded):
        await wait(task, 0.01, what="it")
    assert task.cancelled()


async def test_a_timeout_from_inside_is_not_taken_for_the_deadline():
    async def fails() -> None:
        raise TimeoutError("a socket's")

    with pytest.raises(TimeoutError, match=r"^a socket's$"):
        await wait(fails(), 5, what="it")


async def test_an_inner_deadline_is_told_and_not_the_outer_one():
    with pytest.raises(DeadlineExceeded, match="for the inner one"):
        await wait(wait(forever(), 0.01, what="the inner one"), 5, what="the outer one")


async def test_a_timeout_of_what_was_cancelled_by_the_deadline_comes_as_it_is():
    async def cleans_up() -> None:
        try:
            await forever()
        finally:
            raise TimeoutError("while cleaning up")

    with pytest.raises(TimeoutError, match="while cleaning up"):
        await wait(cleans_up(), 0.01, what="it")


async def test_a_cancellation_from_outside_stays_one():
    waiting = asyncio.create_task(wait(forever(), 5, what="it"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_cancellation_that_comes_with_the_result_is_not_swallowed():
    """asyncio.wait_for did that in Python 3.11, and whoever had cancelled waited for ever."""
    future = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(wait(future, 5, what="it"))
    await asyncio.sleep(0)
    future.set_result(None)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_first_of_several_is_returned_and_the_others_go_on():
    quick, slow = asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(forever())
    assert await first_of([quick, slow], 5) == {quick}
    assert await first_of([slow], 0.01) == set()
    with pytest.raises(DeadlineExceeded, match=LATE):
        await first_of([slow], 0.01, what="it")
    assert not slow.cancelling()
    await end(slow, 5, what="the slow one")
    assert slow.cancelled()


async def test_work_in_a_thread_gives_what_it_gives_and_raises_what_it_raises():
    assert await in_thread(threading.current_thread, 5, what="it") is not threading.current_thread()
    with pytest.raises(SystemExit, match="enough"):
        await in_thread(lambda: sys.exit("enough"), 5, what="it")


HANGS = """
import asyncio, threading
from ray_rl.deadlines import DeadlineExceeded, in_thread

async def main():
    await in_thread(threading.Event().wait, 0.1, what="a file system that hangs")

try:
    asyncio.run(main())
except DeadlineExceeded as late:
    print(late)
"""


def test_a_thread_that_hangs_keeps_no_program_from_its_end():
    program = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    assert program.stdout.startswith("waited 0.1 s for a file system that hangs, and it did not come")


async def test_ending_what_has_failed_is_no_failure():
    async def fails() -> None:
        raise ValueError

    task = asyncio.create_task(fails())
    await first_of([task], 5)
    await end(task, 5, what="it")
    assert isinstance(task.exception(), ValueError)


async def test_what_goes_on_in_spite_of_a_cancellation_is_named():
    enough = asyncio.Event()

    async def stubborn() -> None:
        while not enough.is_set():
            try:
                await enough.wait()
            except asyncio.CancelledError:
                continue

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.01 s for the stubborn one to end"):
        await end(task, 0.01, what="the stubborn one")
    enough.set()
    await wait(task, 5, what="it")


def test_a_result_of_another_thread_has_a_deadline():
    here, late = Future(), Future()
    here.set_result(3)
    assert result(here, 0, what="it") == 3
    with pytest.raises(DeadlineExceeded, match=LATE):
        result(late, 0.01, what="it")
    assert late.cancelled()


def test_a_timeout_in_another_thread_is_its_own():
    failed: Future[None] = Future()
    failed.set_exception(TimeoutError("a socket's"))
    with pytest.raises(TimeoutError, match=r"^a socket's$"):
        result(failed, 5, what="it")


def test_a_thread_that_goes_on_is_named():
    enough = threading.Event()
    thread = threading.Thread(target=enough.wait)
    thread.start()
    with pytest.raises(DeadlineExceeded, match=LATE):
        join(thread, 0.01, what="it")
    enough.set()
    join(thread, 5, what="it")


def test_a_process_that_goes_on_is_named():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with pytest.raises(DeadlineExceeded, match=LATE):
        join(process, 0.01, what="it")
    process.kill()
    join(process, 30, what="it")
    process.stdin.close()


def test_a_loop_that_asks_again_and_again_has_a_deadline():
    Deadline(5, what="it").check()
    with pytest.raises(DeadlineExceeded, match=r"waited 0 s for it, and it did not come"):
        Deadline(0, what="it").check()
    assert 4 < Deadline(5, what="it").left <= 5


@pytest.mark.parametrize("own", [False, True], ids=["late", "the task's own"])
def test_a_ray_timeout_is_told_apart_from_one_that_the_task_raised(monkeypatch, own):
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError

    error: Exception = GetTimeoutError("late")
    if own:
        error = RayTaskError(
            "f", "Traceback ...", error, proctitle="ray::f", pid=1, ip="127.0.0.1"
        ).as_instanceof_cause()

    def fail(refs: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(ray, "get", fail)
    with pytest.raises(GetTimeoutError if own else DeadlineExceeded):
        deadlines.get([], 5, what="it")


def test_a_call_that_knows_no_deadline_gets_one():
    assert call_within(lambda: 3, 5, what="a number") == 3
    with pytest.raises(DeadlineExceeded, match=r"^waited 0.01 s for an answer"):
        call_within(threading.Event().wait, 0.01, what="an answer")


def test_what_a_call_with_a_deadline_raises_is_its_own():
    with pytest.raises(ZeroDivisionError):
        call_within(lambda: 1 // 0, 5, what="a number")
