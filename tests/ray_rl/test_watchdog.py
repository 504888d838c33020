"""A run that does not move says so and leaves the stacks of its processes; one that moves leaves nothing."""

import asyncio
import queue
import threading
from pathlib import Path

import pytest

from ray_rl.stacks import stacks
from ray_rl.watchdog import Watchdog

SOON = 0.05
ENOUGH = 10.0


async def nobody() -> dict[str, str]:
    return {}


class Screen:
    """Where warnings arrive, from the watchdog's thread."""

    def __init__(self) -> None:
        self._warnings: queue.Queue[str] = queue.Queue()

    def warn(self, text: str) -> None:
        self._warnings.put(text)

    async def next(self) -> str:
        return await asyncio.to_thread(self._warnings.get, timeout=ENOUGH)

    def wait(self) -> str:
        return self._warnings.get(timeout=ENOUGH)

    @property
    def is_empty(self) -> bool:
        return self._warnings.empty()


def report(folder: Path) -> str:
    (path,) = (folder / "stacks").iterdir()
    return path.read_text()


async def waits_for_the_learner(event: asyncio.Event) -> None:
    await inner_wait(event)


async def inner_wait(event: asyncio.Event) -> None:
    await event.wait()


async def test_a_stall_is_told_once_with_what_moved_last_and_where_the_stacks_are(tmp_path):
    screen, enough = Screen(), asyncio.Event()

    async def others() -> dict[str, str]:
        return {"learner rank 0": "in train()"}

    waiting = asyncio.create_task(waits_for_the_learner(enough), name="train loop")
    async with Watchdog(tmp_path, SOON, others, screen.warn) as watchdog:
        watchdog.moved("step 3 was trained")
        warning = await screen.next()
        await asyncio.sleep(3 * SOON)
    assert screen.is_empty
    enough.set()
    await waiting
    assert "nothing has moved for 0.05 s" in warning
    assert "step 3 was trained" in warning
    assert str(tmp_path / "stacks") in warning
    text = report(tmp_path)
    assert "thread MainThread" in text
    assert text.index("task train loop") < text.index("waits_for_the_learner") < text.index("in inner_wait")
    assert "=== learner rank 0 ===\nin train()" in text


async def test_a_second_stall_is_told_again(tmp_path):
    screen = Screen()
    async with Watchdog(tmp_path, SOON, nobody, screen.warn) as watchdog:
        watchdog.moved("step 1")
        assert "step 1" in await screen.next()
        watchdog.moved("step 2")
        assert "step 2" in await screen.next()


async def test_a_run_that_moves_is_left_alone(tmp_path):
    screen = Screen()
    async with Watchdog(tmp_path, ENOUGH, nobody, screen.warn) as watchdog:
        watchdog.moved("a group")
    assert screen.is_empty
    assert not (tmp_path / "stacks").exists()


async def test_an_event_loop_that_hangs_is_told_from_outside_of_it(tmp_path):
    screen = Screen()
    async with Watchdog(tmp_path, SOON, nobody, screen.warn, answer_seconds=SOON):
        screen.wait()  # the loop is stuck in here
    text = report(tmp_path)
    assert "test_an_event_loop_that_hangs_is_told_from_outside_of_it" in text
    assert "for the driver's event loop" in text


@pytest.mark.parametrize("fails", [True, False], ids=["fail", "are silent"])
async def test_other_processes_that_do_not_answer_are_named_and_keep_nothing_back(tmp_path, fails):
    screen = Screen()

    async def others() -> dict[str, str]:
        if fails:
            raise KeyError("rank 1 is gone")
        await asyncio.Event().wait()
        return {}

    async with Watchdog(tmp_path, SOON, others, screen.warn, answer_seconds=SOON):
        await screen.next()
    assert "thread MainThread" in report(tmp_path)
    assert ("rank 1 is gone" if fails else "and it did not come") in report(tmp_path)


async def test_a_full_disk_leaves_the_warning_and_the_log(tmp_path, caplog, monkeypatch):
    screen = Screen()

    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    async with Watchdog(tmp_path, SOON, nobody, screen.warn):
        warning = await screen.next()
    assert "No space left on device" in warning
    assert "thread MainThread" in caplog.text


async def test_the_end_of_a_run_is_the_end_of_its_watchdog(tmp_path):
    async with Watchdog(tmp_path, ENOUGH, nobody, print):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


async def test_stacks_show_threads_and_what_each_task_waits_for():
    enough, asked = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=enough.wait, name="grader")
    thread.start()
    task = asyncio.create_task(waits_for_the_learner(asked), name="one step")
    await asyncio.sleep(0)
    text = stacks()
    enough.set()
    asked.set()
    await task
    thread.join(ENOUGH)
    assert "thread grader" in text
    of_task = text[text.index("task one step") :]
    assert (
        of_task.index("in waits_for_the_learner") < of_task.index("in inner_wait") < of_task.index("waits for <Future")
    )


def test_stacks_without_an_event_loop_are_the_threads():
    assert "thread MainThread" in stacks()
    assert "\ntask " not in stacks()
