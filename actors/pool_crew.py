"""The members of a pool: they are started, taken in, replaced when they die, and as many as are wanted."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from actors.pool_member import ActorDied, Member, PoolLimits, RolloutClient, WeightsGone, in_a_line
from actors.pool_publication import Publication, hand_over
from actors.pool_queue import Outage, WorkQueue
from ray_rl.deadlines import DeadlineExceeded, first_of, wait
from ray_rl.protocols import NoActorsLeft

logger = logging.getLogger(__name__)

_LONGEST_DELAY = 60.0
_END_SECONDS = 60.0
_TOLD_ENDS = 3
"""So many of the last ends are told when no actor is left."""


@dataclass(slots=True, eq=False)
class _Place:
    """One of the actors that are wanted, whichever it is at present."""

    member: Member | None = None
    filling: asyncio.Task[None] | None = None
    delay: float = 0.0
    """Before it is filled the next time."""


class Crew:
    """Whoever serves is open in the work queue; whatever becomes of a member, its place is filled again."""

    def __init__(
        self,
        factory: Callable[[int], RolloutClient],
        size: int,
        queue: WorkQueue,
        *,
        limits: PoolLimits,
        serves_loaded: bool,
        warn: Callable[[str], None],
    ) -> None:
        """Nobody is made yet (`start`). Arguments as of `ActorPool`."""
        self._factory = factory
        self._queue = queue
        self._limits = limits
        self._serves_loaded = serves_loaded
        self._warn = warn
        self._indices = count()
        self._places = [_Place() for _ in range(size)]
        self._members: dict[Member, _Place] = {}
        self._kept: Publication | None = None
        """The last that somebody proved, for those that join later."""
        self._publishing = False
        self._arrived = asyncio.Event()
        """Set whenever a member has loaded its engine, and in the end."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._joins: dict[Member, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._died = 0
        self._ends: deque[str] = deque(maxlen=_TOLD_ENDS)
        self._outage = Outage(limits.outage_timeout, warn=warn, over=self._outage_lasts)
        self._closed = False

    @property
    def size(self) -> int:
        """Members that are wanted."""
        return len(self._places)

    @property
    def members(self) -> Sequence[Member]:
        """Those that there are."""
        return list(self._members)

    @property
    def died(self) -> int:
        """Members lost since the start."""
        return self._died

    @property
    def last_ends(self) -> str:
        """What became of the last ones, to be added to a sentence."""
        return f"; the last ones ended so: {'; '.join(self._ends)}" if self._ends else ""

    def reaches(self, member: Member) -> bool:
        """Whether a member that was not there at the last publication can still have what was published."""
        weights = self._kept.weights if self._kept else None
        return weights is not None and weights is not member.missed and weights.reaches(member.client.home)

    async def start(self) -> None:
        """As `ActorPool.start`."""
        try:
            await asyncio.gather(*[self._start_first(self._create(place)) for place in self._places])
        except BaseException:
            await self.shutdown()
            raise
        if not self._queue.serving:
            self._outage.begin(told=False)

    async def shutdown(self) -> None:
        """End every member. Idempotent."""
        self._closed = True
        self._arrived.set()
        self._outage.end()
        for task in self._tasks:
            task.cancel()
        for member in self.members:
            self.retire(member)
        while self._endings:  # each has its deadline
            await first_of(self._endings, _END_SECONDS)

    def resize(self, size: int) -> None:
        """Want so many. Those that only start or wait for weights go first, then those with the least to do."""
        while len(self._places) < size:
            self._places.append(_Place())
            self._fill(self._places[-1])
        newest_first = self._places[::-1]
        for place in sorted(newest_first, key=_worth)[: len(self._places) - size]:
            self._drop(place)

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        """While weights are published nobody joins, for they would read what is written over.

        Raises:
            RuntimeError: another publication is going on.
        """
        if self._publishing:
            raise RuntimeError("two publications at once")
        self._publishing = True
        try:
            while self._joins:  # as each of its waits has a deadline
                await first_of(self._joins.values(), self._limits.publish_timeout)
            yield
        finally:
            self._publishing = False
            self._invite(*self._members)

    async def loaded(self) -> Sequence[Member]:
        """Those that a publication goes to, at least one.

        Raises:
            NoActorsLeft: there was none for `outage_timeout`.
        """
        while not (loaded := [member for member in self._members if member.is_loaded]):
            if self._closed:
                raise NoActorsLeft("the rollout actors were shut down")
            self._arrived.clear()
            try:
                await wait(self._arrived.wait(), self._limits.outage_timeout, what="a rollout actor to publish to")
            except DeadlineExceeded as error:
                raise NoActorsLeft(self._nobody()) from error
        return loaded

    def take_in(self, publication: Publication) -> None:
        """Those that have proven a version serve from now on, and who joins later gets the same."""
        self._kept = publication
        for member in publication.differences:
            if member.state == "waiting for weights":
                self._serve(member)

    def bury(self, member: Member, error: BaseException) -> None:
        """It died, hung or can't be trusted: what it works on fails at once, and its place gets another one. Idempotent."""
        why = in_a_line(error)
        if not member.end(f"{member.name} was given up: {why}"):
            return
        self._died += 1
        self._ends.append(f"{member.name}: {why}")
        lost = "is lost; its prompts go to others" if member.has_served else "did not come up, and another one is tried"
        self._warn(f"{member.name} {lost}: {why}")
        self._refill(self._forget(member), has_served=member.has_served)
        if not self._queue.serving:
            self._outage.begin()

    def retire(self, member: Member) -> None:
        """It is not wanted any more, and has nothing to do. Idempotent."""
        if member.end(f"{member.name} is not wanted any more"):
            self._forget(member)

    async def _start_first(self, member: Member) -> None:
        try:
            await self._load(member)
        except ActorDied:
            if member in self._members:  # else `resize` did not want it any more
                raise

    def _create(self, place: _Place) -> Member:
        member = place.member = Member(self._factory(next(self._indices)))
        self._members[member] = place
        return member

    async def _load(self, member: Member) -> None:
        await member.start(self._limits.start_timeout)
        self._arrived.set()
        self._invite(member)

    def _fill(self, place: _Place) -> None:
        """Put a new member into a place, in the background."""

        async def fill() -> None:
            await asyncio.sleep(place.delay)
            await self._load(self._create(place))

        def failed(error: BaseException) -> None:
            if place.member:
                self.bury(place.member, error)
            else:
                self._warn(f"no rollout actor could be made: {in_a_line(error)}")
                self._refill(place, has_served=False)

        place.filling = _spawn(self._tasks, fill(), failed)

    def _refill(self, place: _Place, *, has_served: bool) -> None:
        if place in self._places and not self._closed:
            place.member = None
            place.delay = 0.0 if has_served else min(_LONGEST_DELAY, 2 * place.delay or self._limits.restart_delay)
            self._fill(place)

    def _drop(self, place: _Place) -> None:
        self._places.remove(place)
        if place.filling:
            place.filling.cancel()
        if (member := place.member) is None:
            return
        if member.load:
            member.drain()
            self._queue.close(member)
        else:
            self.retire(member)

    def _forget(self, member: Member) -> _Place:
        self._queue.close(member)
        ending = wait(member.client.shutdown(), _END_SECONDS, what=f"{member.name} to end")
        _spawn(self._endings, ending, lambda error: logger.warning("%s did not end: %s", member.name, error))
        return self._members.pop(member)

    def _invite(self, *members: Member) -> None:
        """Let those that wait for weights have the last ones, if they can. Who comes during a publication is invited after it."""
        for member in members:
            if member.state != "waiting for weights" or member in self._joins or self._publishing:
                continue
            if self._kept is None and self._serves_loaded:
                self._serve(member)
            elif self._kept is not None and self.reaches(member):
                join = _spawn(self._tasks, self._join(member, self._kept), partial(self.bury, member))
                self._joins[member] = join
                join.add_done_callback(partial(self._joined, member))

    async def _join(self, member: Member, publication: Publication) -> None:
        try:
            await hand_over(member, publication, self._limits.publish_timeout)
        except WeightsGone as error:
            logger.info("%s waits for the next publication: %s", member.name, error)
            member.missed = publication.weights
        else:
            self._serve(member)

    def _joined(self, member: Member, _: object) -> None:
        del self._joins[member]

    def _serve(self, member: Member) -> None:
        member.serve()
        self._outage.end(f"{member.name} serves again")
        self._queue.open(member)

    def _outage_lasts(self) -> None:
        if any(member.is_loaded for member in self._members):
            self._outage.extend()  # what they lack is a publication, which comes when the learner has the time for it
        else:
            self._queue.refuse(self._nobody())

    def _nobody(self) -> str:
        return (
            f"rollout.outage_timeout: for {self._limits.outage_timeout:g} s there was no rollout actor{self.last_ends}; see "
            "their logs, or raise it where machines take longer to come back"
        )


def _worth(place: _Place) -> tuple[int, int]:
    """What is lost with a place, for comparisons."""
    member = place.member
    if member is None or member.state == "starting":
        return 0, 0
    return (1, 0) if member.state == "waiting for weights" else (2, member.load)


def _spawn(
    among: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], failed: Callable[[BaseException], object]
) -> asyncio.Task[None]:
    """Work in the background: a task that is kept while it runs; `failed` is told whatever error it ends with."""
    task = asyncio.create_task(work)
    among.add(task)

    def done(task: asyncio.Task[None]) -> None:
        among.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failed(error)

    task.add_done_callback(done)
    return task
