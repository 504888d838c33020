"""Where the collect loop and the train loop meet: bounded, strict about age, and choosy about what teaches nothing."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ray_rl.config.orchestration import DecidedGroups
from ray_rl.protocols import CollectedGroup
from ray_rl.types import GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one training step gets, and what was sampled but dropped since the batch before it."""

    groups: Sequence[CollectedGroup]
    """To train on. Fewer than a batch, perhaps none, only where decided groups are dropped without refill."""
    filtered: Sequence[GroupSummary]
    """Dropped because all their rewards are equal."""
    stale: Sequence[GroupSummary]
    """Dropped because they were too old."""


class StalenessBuffer:
    """Finished groups on their way to the learner.

    | loop    | does                                | waits for                         | is let on by           |
    |---------|-------------------------------------|-----------------------------------|------------------------|
    | collect | `admit`, sample, `put`              | admitted < (staleness+1) * batch  | `release`, a refill    |
    | train   | `take`, train, publish, `release`   | a batch of fresh enough groups    | `put`                  |

    A group counts as admitted from before it is sampled until the version trained on it is published. With
    max_staleness 0 therefore nothing is sampled while a step trains: strictly on-policy.

    Stale groups, and decided ones under `refill`, give their room back at once, and another prompt is sampled in their
    place. Decided groups under `drop` have taken a place in their batch: nothing replaces them. No dropped prompt is
    sampled again.

    When something dies: `give_back` a batch that was taken in vain, `give_up` a prompt that no actor survives, `undo` what
    the learner has forgotten.
    """

    def __init__(
        self,
        batch: int,
        max_staleness: int,
        total: int | None = None,
        *,
        decided: DecidedGroups = "keep",
        refill_limit: float = 1.0,
        on_drop: Callable[[int, str], None] = lambda position, reason: None,
    ) -> None:
        """Make room for `max_staleness + 1` batches of `batch` groups.

        Args:
            batch: groups per training step.
            max_staleness: versions that a group may be behind.
            total: groups that the run will still take; no more are admitted, but for those that are refilled.
            decided: what becomes of groups whose rewards are all equal.
            refill_limit: with `refill`, most groups sampled for one batch, in batches (stale ones not counted).
            on_drop: told the prompt's position and the reason (`stale`, `decided`) of every group that is dropped.
        """
        self._batch = batch
        self._max_staleness = max_staleness
        self._limit = batch * (max_staleness + 1)
        self._decided = decided
        self._refills_per_batch = int(refill_limit * batch) - batch if decided == "refill" else 0
        self._on_drop = on_drop
        self._refills: Counter[int] = Counter()
        self._taken = 0
        self._admitted = 0
        self._wanted = math.inf if total is None else total
        self._newest = math.inf
        self._forgotten: list[int] = []
        """The versions that were gone back to, in the order in which that happened (`forget`)."""
        self._groups: list[CollectedGroup] = []
        self._filtered: list[GroupSummary] = []
        self._stale: list[GroupSummary] = []
        self._changed = asyncio.Condition()
        self.dropped: Counter[str] = Counter()
        """Reason -> groups, in this sitting."""

    @property
    def depth(self) -> int:
        """Finished groups that wait."""
        return len(self._groups)

    async def admit(self) -> int:
        """Wait for room, then reserve it for one group. Returns a ticket for `put`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._admitted < self._limit and self._wanted > 0)
            self._admitted += 1
            self._wanted -= 1
            return len(self._forgotten)

    def expect(self, version: int) -> None:
        """From now on no policy newer than `version` has been published: `put` refuses groups that say otherwise."""
        self._newest = version

    def forget(self, version: int) -> None:
        """Of what is admitted by now, nothing counts that is newer than `version`: other policies will bear those numbers."""
        self._forgotten.append(version)

    async def put(self, group: CollectedGroup, ticket: int = 0) -> bool:
        """Hand in an admitted group; False, and its room is free again, where its policy version was undone.

        Args:
            group: finished.
            ticket: of `admit`.
        """
        async with self._changed:
            accepted = group.summary.newest_version <= min((self._newest, *self._forgotten[ticket:]))
            # The batch that it would go into; several may be on their way at once.
            number = self._taken + len(self._groups) // self._batch
            if not accepted:
                self._refill(1)
            elif group.summary.decided and self._refills[number] < self._refills_per_batch:
                self._refills[number] += 1
                self._filtered += self._counted("decided", [group])
                self._refill(1)
            else:
                self._groups.append(group)
            self._changed.notify_all()
            return accepted

    async def give_up(self) -> None:
        """An admitted prompt will never become a group: let another one be sampled in its place."""
        async with self._changed:
            self._refill(1)
            self._changed.notify_all()

    async def take(self, version: int) -> Batch:
        """Wait for a batch whose groups are at most max_staleness versions older than `version`; drop older ones.

        The batch is in the order of the stream.
        """
        async with self._changed:
            self._drop_stale(version)
            while True:
                # What arrives meanwhile may be stale, too; looking only when a batch is full keeps it cheap with many actors.
                if len(self._groups) >= self._batch:
                    self._drop_stale(version)
                    if len(self._groups) >= self._batch:
                        return self._next_batch()
                await self._changed.wait()

    async def release(self) -> None:
        """Give back the room of the batch taken last, once the version trained on it is published."""
        async with self._changed:
            self._admitted -= self._batch
            self._changed.notify_all()

    async def give_back(self, batch: Batch, lost: Collection[int] = ()) -> None:
        """The batch taken last was not trained on: its groups go first again, but for those at the positions in `lost`.

        For those, and for what was dropped out of the batch, others are sampled.
        """
        async with self._changed:
            kept = [group for group in batch.groups if group.prompt.position not in lost]
            self._groups = [*kept, *self._groups]
            self._filtered = [*batch.filtered, *self._filtered]
            self._stale = [*batch.stale, *self._stale]
            self._refill(self._batch - len(kept))
            self._changed.notify_all()

    async def undo(self, version: int, steps: int) -> tuple[int, ...]:
        """The policy is `version` again, and the last `steps` training steps will be done once more.

        Returns:
            Positions of the waiting groups that a later, forgotten version took part in: they are gone from here, and their
            prompts are to be sampled again.
        """
        async with self._changed:
            self._newest = version
            self.forget(version)
            undone = [group for group in self._groups if group.summary.newest_version > version]
            self._groups = [group for group in self._groups if group.summary.newest_version <= version]
            self._refill(len(undone))
            self._wanted += steps * self._batch
            self._changed.notify_all()
            return tuple(group.prompt.position for group in undone)

    def _next_batch(self) -> Batch:
        groups, self._groups = self._groups[: self._batch], self._groups[self._batch :]
        groups.sort(key=lambda group: group.prompt.position)
        if self._decided == "drop":
            self._filtered += self._counted("decided", [group for group in groups if group.summary.decided])
            groups = [group for group in groups if not group.summary.decided]
        batch = Batch(groups=groups, filtered=self._filtered, stale=self._stale)
        self._filtered, self._stale = [], []
        self._refills.pop(self._taken, None)
        self._taken += 1
        return batch

    def _drop_stale(self, version: int) -> None:
        stale = [g for g in self._groups if version - g.summary.oldest_version > self._max_staleness]
        if stale:
            self._groups = [g for g in self._groups if version - g.summary.oldest_version <= self._max_staleness]
            self._stale += self._counted("stale", stale)
            self._refill(len(stale))
            self._changed.notify_all()

    def _counted(self, reason: str, groups: Sequence[CollectedGroup]) -> list[GroupSummary]:
        if groups:
            self.dropped[reason] += len(groups)
        for group in groups:
            self._on_drop(group.prompt.position, reason)
        return [group.summary for group in groups]

    def _refill(self, count: int) -> None:
        """Let `count` other groups be sampled."""
        self._admitted -= count
        self._wanted += count
