"""The one way to wait: with a deadline, and an error that says what for and how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray_rl.errors import RunError

T = TypeVar("T")


class DeadlineExceeded(RunError, TimeoutError):
    """Something did not come in time; the message says what and after how many seconds."""


async def wait(awaitable: Awaitable[T], seconds: float, *, what: str) -> T:
    """Await with a deadline.

    Args:
        awaitable: a coroutine, future or Ray object reference.
        seconds: longest wait.
        what: completes the sentence "waited 12 s for ...".

    Raises:
        DeadlineExceeded: nothing came in time; the awaitable is cancelled.
    """
    try:
        return await asyncio.wait_for(_awaited(awaitable), seconds)
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise DeadlineExceeded(f"waited {seconds:g} s for {what}, and it did not come") from error


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


def get(refs: object, seconds: float, *, what: str) -> object:
    """`ray.get` with a deadline.

    Raises:
        DeadlineExceeded: nothing came in time.
    """
    import ray

    try:
        return ray.get(refs, timeout=seconds)  # type: ignore[call-overload]
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineExceeded(f"waited {seconds:g} s for {what}, and it did not come") from error
