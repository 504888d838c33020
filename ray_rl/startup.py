"""How long a process took from its beginning to each first thing that a run does. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Literal, TypeVar

import psutil

T = TypeVar("T")

Milestone = Literal["prepared", "ray", "reward_actors", "learner", "engines", "first_request", "first_group"]
"""What is reached: model and data read; Ray up; all reward actors, the whole learner, all engines ready; the first group
asked for, and done. The first request comes after the evaluation at the start, where there is one."""


class Startup:
    """Seconds since this process began, by milestone; only the first time counts."""

    def __init__(self) -> None:
        """The process's beginning is the system's word, so that imports before this call count."""
        self._began = psutil.Process().create_time()
        self.metrics: dict[str, float] = {}
        """`startup/MILESTONE_seconds` of those reached; with the last one also `startup/cpu_seconds`, of all processes."""

    def reached(self, milestone: Milestone) -> None:
        """Note the time, unless it was reached before."""
        name = f"startup/{milestone}_seconds"
        if name not in self.metrics:
            self.metrics[name] = time.time() - self._began
            if milestone == "first_group":
                self.metrics["startup/cpu_seconds"] = processor_seconds()

    async def reached_by(self, work: Awaitable[T], milestone: Milestone) -> T:
        """Await something whose end is a milestone; what it raises is none."""
        result = await work
        self.reached(milestone)
        return result


def processor_seconds() -> float:
    """Of this process and its living descendants, those that these have waited for included."""
    own = psutil.Process()
    return sum(_seconds_of(process) for process in (own, *own.children(recursive=True)))


def _seconds_of(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system
    return 0.0
