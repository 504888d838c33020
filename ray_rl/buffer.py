"""Where the collect loop and the train loop meet: bounded, and strict about age."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

from ray_rl.protocols import CollectedGroup


class StalenessBuffer:
    """Finished groups on their way to the learner.

    | loop    | does                                | waits for                         | is let on by           |
    |---------|-------------------------------------|-----------------------------------|------------------------|
    | collect | `admit`, sample, `put`              | admitted < (staleness+1) * batch  | `release`, a drop      |
    | train   | `take`, train, publish, `release`   | a batch of fresh enough groups    | `put`                  |

    A group counts as admitted from before it is sampled until the version trained on it is published. With
    max_staleness 0 therefore nothing is sampled while a step trains: strictly on-policy.
    """

    def __init__(self, batch: int, max_staleness: int, total: int | None = None) -> None:
        """Make room for `max_staleness + 1` batches of `batch` groups.

        Args:
            batch: groups per training step.
            max_staleness: versions that a group may be behind.
            total: groups that the run will still train on; no more are admitted, but for those that were dropped.
        """
        self._batch = batch
        self._max_staleness = max_staleness
        self._limit = batch * (max_staleness + 1)
        self._admitted = 0
        self._wanted = math.inf if total is None else total
        self._groups: list[CollectedGroup] = []
        self._changed = asyncio.Condition()
        self.dropped: Counter[str] = Counter()
        self.dropped_positions: set[int] = set()

    @property
    def depth(self) -> int:
        """Finished groups that wait."""
        return len(self._groups)

    async def admit(self) -> None:
        """Wait for room, then reserve it for one group."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._admitted < self._limit and self._wanted > 0)
            self._admitted += 1
            self._wanted -= 1

    async def put(self, group: CollectedGroup) -> None:
        """Hand in an admitted group."""
        async with self._changed:
            self._groups.append(group)
            self._changed.notify_all()

    async def take(self, version: int) -> list[CollectedGroup]:
        """Wait for a batch whose groups are at most max_staleness versions older than `version`; drop older ones."""
        async with self._changed:
            while True:
                self._drop_stale(version)
                if len(self._groups) >= self._batch:
                    taken, self._groups = self._groups[: self._batch], self._groups[self._batch :]
                    return taken
                await self._changed.wait()

    async def release(self, count: int) -> None:
        """Give back the room of `count` groups, once the version trained on them is published."""
        async with self._changed:
            self._admitted -= count
            self._changed.notify_all()

    def _drop_stale(self, version: int) -> None:
        fresh = [g for g in self._groups if version - g.summary.oldest_version <= self._max_staleness]
        self.dropped_positions |= {g.prompt.position for g in self._groups} - {g.prompt.position for g in fresh}
        stale = len(self._groups) - len(fresh)
        if stale:
            self.dropped["stale"] += stale
            self._admitted -= stale
            self._wanted += stale
            self._groups = fresh
            self._changed.notify_all()
