"""What a process is doing: the call stacks of its threads and of the tasks of an event loop, to be read by a person."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

_FRAME_NAMES = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))
"""Where coroutines, generators and asynchronous generators keep their frame and what they wait for."""


def stacks(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """What every thread of this process and every task of a loop is doing, innermost call last.

    Args:
        loop: whose tasks; from any thread, for instance when the loop hangs. Unset: the loop that runs in this thread, if any.
    """
    if loop is None:
        loop = _running_loop()
    parts = [f"process {os.getpid()} at {time.strftime('%Y-%m-%d %H:%M:%S')}", *_threads()]
    if loop is not None:
        parts.extend(_tasks(loop))
    return "\n\n".join(parts) + "\n"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "unknown to Python")
        yield f"thread {name} ({ident})\n" + "".join(traceback.format_stack(frame)).rstrip()


def _tasks(loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    for task in sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()):
        # Which future or task it is that a task waits for, only the task itself knows.
        awaited = getattr(task, "_fut_waiter", None)
        lines = [f"task {task.get_name()}", *_await_chain(task.get_coro())]
        yield "\n".join(lines if awaited is None else [*lines, f"  waits for {awaited!r}"])


def _await_chain(awaited: Any) -> Iterator[str]:
    """Coroutine by coroutine; `Task.print_stack` shows the outermost only."""
    while awaited is not None:
        frame, awaited = _frame_and_awaited(awaited)
        if frame is not None:
            yield "".join(traceback.format_list(traceback.extract_stack(frame, limit=1))).rstrip()


def _frame_and_awaited(awaited: Any) -> tuple[FrameType | None, Any]:
    for frame_name, awaited_name in _FRAME_NAMES:
        if hasattr(awaited, frame_name):
            return getattr(awaited, frame_name), getattr(awaited, awaited_name)
    return None, None
