"""The one way to wait: with a deadline, and an error that says what for, how long, since when and why perhaps in vain.

    async code                                  | code that blocks a thread
    --------------------------------------------|--------------------------------------------
    `wait` for an awaitable or a Ray reference  | `get` of Ray references
    `first_of` several tasks                    | `result` of a `concurrent.futures.Future`
    `end` a task: cancel it, wait until it has  | `join` a thread or a process
    `in_thread` for work that blocks            | `call_within` for what knows no deadline

`Deadline` is for loops that ask again and again. tests/test_waits.py finds whoever waits otherwise.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from ray_rl.errors import RunError

T = TypeVar("T")


class DeadlineExceeded(RunError, TimeoutError):
    """Something did not come in time; the message says what, after how many seconds, since when and the likely causes."""


class Deadline:
    """A wait that began when this was made."""

    def __init__(self, seconds: float, *, what: str, causes: str = "") -> None:
        """Begin to wait.

        Args:
            seconds: longest wait.
            what: completes the sentence "waited 12 s for ...".
            causes: completes the sentence "likely: ...", with the mend; empty where `what` says it all.
        """
        self._seconds = seconds
        self._what = what
        self._causes = causes
        self._clock = time.strftime("%H:%M:%S")
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that remain, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise DeadlineExceeded when nothing remains."""
        if self.left == 0:
            raise self.exceeded()

    def exceeded(self) -> DeadlineExceeded:
        """The error of this wait."""
        likely = f"; likely: {self._causes}" if self._causes else ""
        return DeadlineExceeded(
            f"waited {self._seconds:g} s for {self._what}, and it did not come (since {self._clock}){likely}"
        )


async def wait(awaitable: Awaitable[T], seconds: float, *, what: str, causes: str = "") -> T:
    """Await with a deadline.

    Args:
        awaitable: a coroutine, future or Ray object reference.
        seconds: longest wait.
        what: completes the sentence "waited 12 s for ...".
        causes: completes the sentence "likely: ...".

    Raises:
        DeadlineExceeded: nothing came in time; the awaitable is cancelled. A TimeoutError of its own comes as it is.
    """
    deadline = Deadline(seconds, what=what, causes=causes)
    own: TimeoutError | None = None
    try:
        # Not asyncio.wait_for: until Python 3.12 it could swallow a cancellation that came with the result.
        async with asyncio.timeout(seconds):
            try:
                return await awaitable
            except TimeoutError as error:
                own = error
                raise
    except TimeoutError as error:
        if error is own:
            raise
        raise deadline.exceeded() from error


async def first_of(
    tasks: Iterable[asyncio.Future[Any]], seconds: float, *, what: str = "", causes: str = ""
) -> set[asyncio.Future[Any]]:
    """Those of some tasks that are done, as soon as one is; all go on, whatever comes of it.

    Args:
        tasks: what to look at.
        seconds: longest wait.
        what: completes the sentence "waited 12 s for ..."; empty for who only looks, and does something else in between.
        causes: completes the sentence "likely: ...".

    Returns:
        Without `what` perhaps none.

    Raises:
        DeadlineExceeded: none is done in time, and `what` was given.
    """
    deadline = Deadline(seconds, what=what, causes=causes)
    done, _ = await asyncio.wait(set(tasks), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if what and not done:
        raise deadline.exceeded()
    return done


async def end(task: asyncio.Future[Any], seconds: float, *, what: str) -> None:
    """Cancel a task and wait until nothing of it runs on; what it ended with stays its own.

    Raises:
        DeadlineExceeded: it goes on in spite of the cancellation.
    """
    deadline = Deadline(seconds, what=f"{what} to end")
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        raise deadline.exceeded()


async def in_thread(work: Callable[[], T], seconds: float, *, what: str, causes: str = "") -> T:
    """Do work that blocks in a thread of its own, and await that. `call_within` is the same for code that may block itself.

    Not `asyncio.to_thread`: at its end a program waits for those threads, so that one which hangs, as in a file system that
    does not answer, would keep the error about it from ever being seen.

    Args:
        work: to be called in the thread.
        seconds: longest wait.
        what: completes the sentence "waited 12 s for ...".
        causes: completes the sentence "likely: ...".

    Raises:
        DeadlineExceeded: it is not done in time; it goes on, and whatever comes of it is forgotten.
    """
    return await wait(asyncio.wrap_future(_in_daemon(work, what)), seconds, what=what, causes=causes)


def get(refs: object, seconds: float, *, what: str, causes: str = "") -> object:
    """`ray.get` with a deadline.

    Raises:
        DeadlineExceeded: nothing came in time.
    """
    import ray

    deadline = Deadline(seconds, what=what, causes=causes)
    try:
        return ray.get(refs, timeout=seconds)  # type: ignore[call-overload]
    except ray.exceptions.GetTimeoutError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # the task's own, which Ray gives its type too
        raise deadline.exceeded() from error


def result(future: concurrent.futures.Future[T], seconds: float, *, what: str, causes: str = "") -> T:
    """The result of work in another thread. Blocks this one, so never for work of this thread's event loop.

    Raises:
        DeadlineExceeded: it is not there in time; the work is cancelled if it can be.
    """
    deadline = Deadline(seconds, what=what, causes=causes)
    done, _ = concurrent.futures.wait([future], timeout=seconds)
    if not done:
        future.cancel()
        raise deadline.exceeded()
    return future.result()


def call_within(call: Callable[[], T], seconds: float, *, what: str, causes: str = "") -> T:
    """Call what knows no deadline itself; the thread of a call that is late is given up, and ends with the process.

    Args:
        call: runs in a thread of its own.
        seconds: longest wait.
        what: completes the sentence "waited 12 s for ...".
        causes: completes the sentence "likely: ...".

    Raises:
        DeadlineExceeded: it is not done in time.
    """
    return result(_in_daemon(call, what), seconds, what=what, causes=causes)


def _in_daemon(work: Callable[[], T], what: str) -> concurrent.futures.Future[T]:
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # who gives up waiting does not end the work

    def run() -> None:
        try:
            done.set_result(work())
        # Whatever the work raises belongs to who waits for it.
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)

    threading.Thread(target=run, name=f"waited for: {what}", daemon=True).start()
    return done


def join(worker: threading.Thread | subprocess.Popen[Any], seconds: float, *, what: str, causes: str = "") -> None:
    """Wait until a thread or process has ended, without doing anything to end it.

    Raises:
        DeadlineExceeded: it has not in time.
    """
    deadline = Deadline(seconds, what=what, causes=causes)
    if isinstance(worker, threading.Thread):
        worker.join(seconds)
        if worker.is_alive():
            raise deadline.exceeded()
        return
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise deadline.exceeded() from error
