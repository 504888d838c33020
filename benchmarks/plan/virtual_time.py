"""An asyncio event loop whose clock jumps: whoever sleeps for an hour does so at once, in the right order.

The code that runs in it is unchanged: `asyncio.sleep`, `asyncio.timeout` and the deadlines of `ray_rl.deadlines` go by the
loop's clock, and what measures with `time.monotonic` gets the same one for as long as the loop runs. That function is the
whole process's: nothing else may run beside it that measures time.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple

from ray_rl.errors import RunError

T = TypeVar("T")
V = TypeVar("V")
Ts = TypeVarTuple("Ts")

_THREAD_LOOK_SECONDS = 0.01
"""Of real time, between looks whether a thread has brought something."""


class Deadlock(RuntimeError):
    """Nothing can happen any more: no task is ready, and none waits for a moment in time."""


class TooLong(RunError):
    """The clock has passed the end that was set."""


def run_in_virtual_time(main: Coroutine[Any, Any, T], *, most_seconds: float) -> T:
    """Run a coroutine as `asyncio.run` does, on a clock of its own that begins at 0.

    The clock stands still while code runs. When nothing is ready it jumps to the next moment that somebody waits for; while a
    thread works that was started meanwhile (`ray_rl.deadlines.in_thread`), it stands and that thread is waited for in real time.

    Args:
        main: what to run.
        most_seconds: virtual time after which it is given up.

    Raises:
        Deadlock: nothing is ready, and nothing will ever be.
        TooLong: it did not end by `most_seconds`.
    """
    clock = _Clock(most_seconds)
    with _time_goes_by(clock), asyncio.Runner(loop_factory=lambda: _VirtualLoop(clock)) as runner:
        return runner.run(main)


class _Clock:
    """Virtual seconds."""

    def __init__(self, most_seconds: float) -> None:
        self.now = 0.0
        self._most_seconds = most_seconds

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self._most_seconds:
            self._most_seconds = float("inf")  # its tasks still have to be ended
            raise TooLong(f"not done after {self.now:.0f} s of simulated time; the rates make it take too long")


@contextmanager
def _time_goes_by(clock: Callable[[], float]) -> Iterator[None]:
    real = time.monotonic
    time.monotonic = clock  # type: ignore[assignment]
    try:
        yield
    finally:
        time.monotonic = real


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: _Clock) -> None:
        self._virtual_clock = clock
        super().__init__(_JumpingSelector(clock))

    def time(self) -> float:
        return self._virtual_clock.now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], V], *args: *Ts) -> asyncio.Future[V]:
        """Refused: an idle thread of a pool looks like one that works."""
        raise RuntimeError("no pools of threads in virtual time; use ray_rl.deadlines.in_thread")


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep, its clock jumps instead."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock
        self._threads = frozenset(threading.enumerate())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        while True:
            works = self._others_work()  # asked before the look, so that what a thread brings at its end is seen
            ready = super().select(_THREAD_LOOK_SECONDS if works else 0)
            if ready:
                return ready
            if works:
                continue
            if timeout is None:
                raise Deadlock("nothing is ready and no task waits for a moment in time: each waits for another one")
            self._clock.jump(timeout)
            return []

    def _others_work(self) -> bool:
        return threading.active_count() > len(self._threads) and any(
            thread not in self._threads for thread in threading.enumerate()
        )
