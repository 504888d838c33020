"""What lies between the driver of a run and those who ask it something. Knows no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_rl import deadlines
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.protocols import ActorStatus

ANSWER_SECONDS = 10.0
"""In which the driver must answer what lies in its mailbox."""
PERHAPS_OBEYED = "the order may still be carried out; see ray-rl status"
"""What to say where an order was given and its answer did not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run in progress, as its driver sees it."""

    name: str
    step: int
    """Training steps done."""
    steps: int
    """Of the whole run."""
    phase: str
    """What it is doing."""
    seconds_since_step: float
    """Since the last training step ended, or since the start."""
    policy_version: int
    buffer_depth: int
    """Finished groups that wait for the learner."""
    actors_wanted: int
    actors: tuple[ActorStatus, ...]
    """All that there are, also those that start or end."""
    actors_died: int
    """In this sitting."""
    learner_restarts: int
    """In this sitting."""
    ledger: Mapping[str, int]
    """Where the prompts so far ended -> how many."""
    metrics: Mapping[str, float]
    """Some of the last step's; empty before the first."""
    seconds_old: float = 0.0
    """Since the driver said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Somebody wants another number of rollout actors."""

    number: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the driver says to an order."""

    accepted: bool
    text: str
    """One line: what happens now, or why nothing does."""


class Mailbox:
    """What lies between the driver and those who ask. `ray_rl.control` makes a Ray actor of it."""

    def __init__(self) -> None:
        self._status: RunStatus | None = None
        self._posted_at = 0.0
        self._posted = asyncio.Event()
        self._orders: list[Order] = []
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._count = 0

    async def exchange(self, status: RunStatus, answers: Mapping[int, Answer]) -> list[Order]:
        """The driver's call.

        Args:
            status: of now.
            answers: to orders it has got before, by their numbers.

        Returns:
            Orders that have come since.
        """
        self._status, self._posted_at = status, time.monotonic()
        self._posted.set()
        for number, answer in answers.items():
            waiting = self._waiting.pop(number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        orders, self._orders = self._orders, []
        return orders

    async def ask(self) -> RunStatus:
        """What the driver posted last."""
        await deadlines.wait(self._posted.wait(), ANSWER_SECONDS, what="the run's driver to tell how it is")
        assert self._status is not None
        return replace(self._status, seconds_old=time.monotonic() - self._posted_at)

    async def scale(self, size: int) -> Answer:
        """Order so many rollout actors, and wait for what the driver says to it.

        Raises:
            DeadlineExceeded: it says nothing; the message tells whether the order is withdrawn.
        """
        self._count += 1
        order, answer = Order(number=self._count, size=size), asyncio.get_running_loop().create_future()
        self._orders.append(order)
        self._waiting[order.number] = answer
        try:
            return await deadlines.wait(answer, ANSWER_SECONDS, what="the run's driver to take the order")
        except DeadlineExceeded as error:
            becomes = "the order is withdrawn" if order in self._orders else PERHAPS_OBEYED
            raise DeadlineExceeded(f"{error}; {becomes}") from error
        finally:
            self._waiting.pop(order.number, None)
            if order in self._orders:  # too late: nobody would hear the answer
                self._orders.remove(order)
