"""Who works for whom: the places of the serving actors, handed out in the order in which work came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from actors.pool_member import Member
from ray_rl.protocols import NoActorsLeft


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    need: int
    turn: asyncio.Future[Member]


class WorkQueue:
    """First come, first served, by whoever has least to do.

    An event costs the same whether there are two actors or a thousand: serving members lie in bins by their load, and a place
    that becomes free wakes the one who gets it.
    """

    def __init__(self, places: int) -> None:
        """No member serves.

        Args:
            places: of each member.
        """
        self.places = places
        self._bins: list[dict[Member, None]] = [{} for _ in range(places + 1)]
        self._lowest = 0
        """No bin below it holds a member."""
        self._serving = 0
        self._waiters: deque[_Waiter] = deque()
        self._refusal: str | None = None

    @property
    def serving(self) -> int:
        """Members that get work."""
        return self._serving

    def open(self, member: Member) -> None:
        """It gets work from now on; so nothing is refused any more."""
        self._refusal = None
        self._serving += 1
        self._put(member)
        self._hand_out()

    def close(self, member: Member) -> None:
        """It gets no more work. Idempotent."""
        if self._take_out(member):
            self._serving -= 1

    def refuse(self, why: str) -> None:
        """Everyone who waits, or comes before the next member is opened, gets a `NoActorsLeft` that says why."""
        self._refusal = why
        while self._waiters:
            turn = self._waiters.popleft().turn
            if not turn.done():
                turn.set_exception(NoActorsLeft(why))

    async def take(self, need: int, *, first: bool = False) -> Member:
        """Places of one member; give them back with `give`.

        Args:
            need: how many, at most `places`.
            first: come before everyone who waits.

        Raises:
            NoActorsLeft: `refuse` was or is called.
        """
        if self._refusal is not None:
            raise NoActorsLeft(self._refusal)
        member = self._least_loaded(need) if first or not self._waiters else None
        if member is not None:
            self._move(member, need)
            return member
        waiter = _Waiter(need, asyncio.get_running_loop().create_future())
        if first:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            # No deadline of its own: while members serve each of their groups has one, and while none does `refuse` ends it.
            return await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.give(waiter.turn.result(), need)  # handed over in the very moment
            self._hand_out()  # it may have held up others that need less
            raise

    def give(self, member: Member, need: int) -> None:
        """Places are free again; also those of a member that is closed."""
        self._move(member, -need)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.turn.done():
                member = self._least_loaded(waiter.need)
                if member is None:
                    return
                self._move(member, waiter.need)
                waiter.turn.set_result(member)
            self._waiters.popleft()

    def _least_loaded(self, need: int) -> Member | None:
        while self._lowest < self.places and not self._bins[self._lowest]:
            self._lowest += 1
        if self._lowest + need > self.places:
            return None
        return next(iter(self._bins[self._lowest]), None)

    def _move(self, member: Member, change: int) -> None:
        is_open = self._take_out(member)
        member.set_load(member.load + change)
        if is_open:
            self._put(member)

    def _put(self, member: Member) -> None:
        self._bins[member.load][member] = None
        self._lowest = min(self._lowest, member.load)

    def _take_out(self, member: Member) -> bool:
        found = member in self._bins[member.load]
        if found:
            del self._bins[member.load][member]
        return found


class Outage:
    """The time in which nobody serves; when it has lasted too long it is over for those who wait."""

    def __init__(self, seconds: float, *, warn: Callable[[str], None], over: Callable[[], object]) -> None:
        """There is none yet.

        Args:
            seconds: the longest.
            warn: tells people when one begins and ends.
            over: called when one lasts longer.
        """
        self._seconds = seconds
        self._warn = warn
        self._over = over
        self._timer: asyncio.TimerHandle | None = None
        self._told = False

    def begin(self, *, told: bool = True) -> None:
        """Nobody serves from now on; harmless when that was so before.

        Args:
            told: whether people hear of it. What is the rule before the first publication is no news.
        """
        if self._timer is None:
            self._told = told
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._over)
            if told:
                self._warn(f"no rollout actor is left; waiting up to {self._seconds:g} s for one to start")

    def extend(self) -> None:
        """Not over yet: once more so long."""
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._over)

    def end(self, why: str = "") -> None:
        """Somebody serves, or nobody waits any more; harmless when there was none.

        Args:
            why: for people, if they were told of the beginning; nothing is said where it is empty.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._told and why:
                self._warn(why)
