"""An engine that samples no tokens but takes the time for them: a batch of sequences that share it evenly."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_TINY = 1e-3
"""Of a token: what rounding may lack at the moment in which a sequence ends."""


def step_seconds(tokens_per_second: Mapping[int, float]) -> Callable[[int], float]:
    """Running sequences -> seconds of one decoding step, in which each of them gets a token.

    Between the measured points a straight line; before the first its own; after the last in proportion to the sequences.
    ``step_seconds({2: 20.0, 4: 20.0})(3) == 0.15``

    Args:
        tokens_per_second: running sequences, ascending -> tokens per second of all of them together.
    """
    points = [(count, count / rate) for count, rate in tokens_per_second.items()]

    def seconds(count: int) -> float:
        if count <= points[0][0]:
            return points[0][1]
        for (low, at_low), (high, at_high) in itertools.pairwise(points):
            if count <= high:
                return at_low + (at_high - at_low) * (count - low) / (high - low)
        last, at_last = points[-1]
        return at_last * count / last

    return seconds


@dataclass(slots=True)
class _Request:
    """Sequences that somebody awaits together."""

    left: int
    done: asyncio.Future[None]


class SimulatedEngine:
    """Processor sharing with a waiting line: up to `max_sequences` run, each gets a token in every step, older ones go first.

    All running sequences have come equally far since they began, so one counter tells the progress of all of them, and the
    next event is the smallest end: an event costs the logarithm of the batch.
    """

    def __init__(self, tokens_per_second: Mapping[int, float], max_sequences: int) -> None:
        """Idle.

        Args:
            tokens_per_second: as for `step_seconds`.
            max_sequences: that run at once.
        """
        of_count = step_seconds(tokens_per_second)
        self._step_seconds = [0.0, *(of_count(count) for count in range(1, max_sequences + 1))]
        self._max_sequences = max_sequences
        self._running: list[tuple[float, int, _Request]] = []
        """Progress at which each ends."""
        self._waiting: list[tuple[int, int, int, _Request]] = []
        """Age of its group, and length."""
        self._ids = itertools.count()
        self._progress = 0.0
        """Tokens that a sequence would have which had run for ever."""
        self._prefill_seconds = 0.0
        """That are still to be spent before the next token."""
        self._looked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._pauses = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.busy_seconds = 0.0
        """In which something ran; pauses are none of them."""

    @property
    def best_rate(self) -> float:
        """Tokens per second of a full batch."""
        return self._max_sequences / self._step_seconds[-1]

    async def sample(self, lengths: Sequence[int], *, age: int, prefill_seconds: float = 0.0) -> None:
        """Return when sequences of these lengths are done.

        Args:
            lengths: in tokens, each at least 1.
            age: of the group; smaller ones leave the waiting line first.
            prefill_seconds: of their common prompt.
        """
        if not lengths:
            return
        self.look()
        self._prefill_seconds += prefill_seconds
        request = _Request(left=len(lengths), done=asyncio.get_running_loop().create_future())
        for length in lengths:
            heapq.heappush(self._waiting, (age, next(self._ids), length, request))
        self._go_on()
        await request.done

    async def pause(self, seconds: float, *, drain: bool) -> None:
        """Sample nothing for so long; with `drain`, first complete what runs, while nothing else begins."""
        if drain:
            self._max_sequences, most = 0, self._max_sequences
            await self._idle.wait()
            self._max_sequences = most
        self.look()
        self._pauses += 1
        self._go_on()
        await asyncio.sleep(seconds)
        self.look()
        self._pauses -= 1
        self._go_on()

    def look(self) -> None:
        """Take in what has happened since the last look."""
        now = asyncio.get_running_loop().time()
        seconds, self._looked_at = now - self._looked_at, now
        if not self._running or self._pauses:
            return
        self.busy_seconds += seconds
        spent = min(seconds, self._prefill_seconds)
        self._prefill_seconds -= spent
        self._progress += (seconds - spent) / self._step_seconds[len(self._running)]
        while self._running and self._running[0][0] <= self._progress + _TINY:
            _, _, request = heapq.heappop(self._running)
            request.left -= 1
            if not request.left and not request.done.done():
                request.done.set_result(None)

    def _go_on(self) -> None:
        """Begin what has a place, and wake when the next sequence ends."""
        while self._waiting and len(self._running) < self._max_sequences:
            _, number, length, request = heapq.heappop(self._waiting)
            heapq.heappush(self._running, (self._progress + length, number, request))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._running:
            self._idle.set()
            return
        self._idle.clear()
        if not self._pauses:
            left = max(0.0, self._running[0][0] - self._progress) * self._step_seconds[len(self._running)]
            self._timer = asyncio.get_running_loop().call_later(self._prefill_seconds + left, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.look()
        self._go_on()
