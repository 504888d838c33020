"""Notices a run that has not moved for long, and writes down what every process of it is doing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

from ray_rl.deadlines import DeadlineExceeded, in_thread, result, wait
from ray_rl.errors import NotWritten, writing
from ray_rl.stacks import stacks

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Movement:
    what: str
    clock: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))
    at: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches while it is entered, from a thread: the event loop may be what hangs.

    One file per stall, `stacks/<time>.txt`: this process's threads and tasks, then, if the event loop still answers, the other
    processes'. What moves after that begins a new watch.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        collect: Callable[[], Awaitable[Mapping[str, str]]],
        warn: Callable[[str], None],
        *,
        answer_seconds: float = 30.0,
    ) -> None:
        """Enter it to begin.

        Args:
            folder: of the run.
            seconds: without any movement, after which a run has stalled.
            collect: asks the other processes; name -> what it is doing (`ray_rl.stacks.stacks`). Runs in the event loop.
            warn: tells the user, in the watchdog's thread.
            answer_seconds: longest wait for `collect`.
        """
        self._folder = folder / "stacks"
        self._seconds = seconds
        self._collect = collect
        self._warn = warn
        self._answer_seconds = answer_seconds
        self._last = _Movement(what="the run began")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._loop: asyncio.AbstractEventLoop  # known when entered

    async def __aenter__(self) -> Watchdog:
        """Begin to watch, for this event loop."""
        self._loop = asyncio.get_running_loop()
        self.moved("the run began")
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer. A report in the making may still be finished."""
        self._closed.set()
        # In a thread, for the watchdog may be waiting for this event loop.
        await in_thread(partial(self._thread.join, _END_SECONDS), 2 * _END_SECONDS, what="the watchdog to end")

    def moved(self, what: str) -> None:
        """The run is alive. Cheap, from any thread.

        Args:
            what: completes the sentence "since ... nothing has moved", for instance "step 12 was trained".
        """
        self._last = _Movement(what=what)

    def _watch(self) -> None:
        told: _Movement | None = None
        left = self._seconds
        while not self._closed.wait(left):
            last = self._last
            left = last.at + self._seconds - time.monotonic()
            if left <= 0:
                if last is not told:
                    told = last
                    self._report(last)
                left = self._seconds

    def _report(self, last: _Movement) -> None:
        path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}.txt"
        stalled = f"nothing has moved for {self._seconds:g} s; the last that did, at {last.clock}: {last.what}"
        own = f"{stalled}\n\n=== the driver ===\n{stacks(self._loop)}"
        try:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(own)  # before the others are asked, for that may hang
                others = self._others()
                with path.open("a") as file:
                    file.write(others)
        except NotWritten as error:
            logger.error("%s", own)
            self._warn(f"{stalled}. What the driver is doing is in its log: {error}")
        else:
            self._warn(f"{stalled}. What each process is doing: {path}")

    def _others(self) -> str:
        asked = asyncio.run_coroutine_threadsafe(self._ask(), self._loop)
        try:
            # `_ask` keeps its own deadline; past this one it is the event loop that hangs.
            return result(asked, self._answer_seconds + 1, what="the driver's event loop to ask the other processes")
        except (DeadlineExceeded, concurrent.futures.CancelledError) as error:
            return f"\n=== the other processes ===\n{error or 'the run ended meanwhile'}\n"

    async def _ask(self) -> str:
        # Whatever goes wrong in other processes is part of the report.
        asked = asyncio.gather(self._collect(), return_exceptions=True)
        try:
            (answer,) = await wait(asked, self._answer_seconds, what="the other processes to tell what they are doing")
        except DeadlineExceeded as error:
            answer = error
        if isinstance(answer, BaseException):
            return f"\n=== the other processes ===\n{type(answer).__name__}: {answer}\n"
        return "".join(f"\n=== {name} ===\n{text}\n" for name, text in answer.items())
