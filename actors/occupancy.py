"""How full an engine is while its actor has all the work that it may have (pure but for the clock)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Occupancy:
    """The time in which an engine had requests for less than half a batch although more groups may wait.

    More may wait when the actor works on as many groups as it is ever given. Where staleness admits fewer groups than there
    are places, none does. Requests in the engine's own queue count: it takes them up as soon as it can.
    """

    def __init__(self, most_groups: int, most_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Of an actor that is given `most_groups` at once, and an engine that runs `most_requests` at once."""
        self._most_groups = most_groups
        self._most_requests = most_requests
        self._clock = clock
        self._groups = 0
        self._requests = 0
        self._since = clock()
        self._underfull = 0.0

    @contextmanager
    def group(self) -> Iterator[None]:
        """A group in the making."""
        self._advance()
        self._groups += 1
        try:
            yield
        finally:
            self._advance()
            self._groups -= 1

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request that the engine has."""
        self._advance()
        self._requests += 1
        try:
            yield
        finally:
            self._advance()
            self._requests -= 1

    def take_underfull(self) -> float:
        """Seconds since the last call in which the batch was less than half full while more groups may have waited."""
        self._advance()
        seconds, self._underfull = self._underfull, 0.0
        return seconds

    def _advance(self) -> None:
        now = self._clock()
        if self._groups >= self._most_groups and 2 * self._requests < self._most_requests:
            self._underfull += now - self._since
        self._since = now
