"""Many rollout actors as one: work goes to the least loaded healthy actor, and leaves one that died.

The pool speaks to its actors through `RolloutClient`, so that real and simulated actors run under the same code.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ray_rl.deadlines import wait
from ray_rl.errors import RunError
from ray_rl.protocols import CollectedGroup, PublishedWeights
from ray_rl.types import Prompt, ScoredSample
from ray_rl.weight_manifest import Probe

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ActorDied(RunError):
    """A rollout actor, or its engine's process, is gone; the message says which and what Ray knows."""


class NoActorsLeft(RunError):
    """Every rollout actor died."""


class RolloutClient(Protocol):
    """One rollout actor, as the pool sees it. Each verb raises `ActorDied` when its process is gone."""

    name: str

    async def start(self) -> None:
        """Wait until the engine is loaded."""

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """One group."""

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers."""

    async def receive_weights(self, weights: PublishedWeights) -> float:
        """Take new weights and go on. Returns the seconds in which the engine sampled nothing."""

    async def prove_weights(self, probe: Probe) -> float:
        """Largest difference between the engine's log-probabilities and the probe's."""

    async def take_underfull(self) -> float:
        """Seconds since the last call in which the engine's batch was less than half full although groups may have waited."""

    async def discard_weights(self, version: int) -> None:
        """Remove what the transfer left on the actor's node."""

    async def shutdown(self) -> None:
        """End the actor and its engine."""


@dataclass(slots=True)
class _Member:
    client: RolloutClient
    in_flight: int = 0
    healthy: bool = True
    idle_since: float = field(default_factory=lambda: time.monotonic())
    """When the last of its groups ended."""
    idle_seconds: float = 0.0
    """Without any group, since `take_idle`."""

    def begin(self) -> None:
        if self.in_flight == 0:
            self.idle_seconds += time.monotonic() - self.idle_since
        self.in_flight += 1

    def end(self) -> None:
        self.in_flight -= 1
        self.idle_since = time.monotonic()

    def take_idle(self) -> float:
        """Idle seconds since the last call."""
        now = time.monotonic()
        if self.in_flight == 0:
            self.idle_seconds += now - self.idle_since
            self.idle_since = now
        seconds, self.idle_seconds = self.idle_seconds, 0.0
        return seconds


class ActorPool:
    """Routing by load. Implements `ray_rl.protocols.RolloutPool`."""

    def __init__(
        self,
        factory: Callable[[int], RolloutClient],
        size: int,
        *,
        groups_in_flight: int,
        start_timeout: float,
        group_timeout: float,
        publish_timeout: float,
    ) -> None:
        """Create the actors; `start` waits for them.

        Args:
            factory: makes the client of actor i.
            size: number of actors.
            groups_in_flight: groups that one actor works on at once.
            start_timeout: seconds until every engine must be loaded.
            group_timeout: seconds for one group or evaluation.
            publish_timeout: seconds for one publication to all actors.
        """
        self._members = [_Member(factory(index)) for index in range(size)]
        self._groups_in_flight = groups_in_flight
        self._start_timeout = start_timeout
        self._group_timeout = group_timeout
        self._publish_timeout = publish_timeout

    async def start(self) -> None:
        """Wait until every actor has loaded its engine.

        Raises:
            DeadlineExceeded: one did not in time.
        """
        await asyncio.gather(
            *(
                wait(member.client.start(), self._start_timeout, what=f"{member.client.name} to load its engine")
                for member in self._members
            )
        )

    @property
    def capacity(self) -> int:
        """Groups that the healthy actors work on at once."""
        return self._groups_in_flight * sum(member.healthy for member in self._members)

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """A group from the least loaded actor; when it dies, from another one."""
        return await self._route(lambda client: client.collect(prompt), what=f"the group of prompt {prompt.prompt_id}")

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers from the least loaded actor; when it dies, from another one."""
        return await self._route(
            lambda client: client.evaluate(prompt, samples, temperature),
            what=f"the answers to evaluation prompt {prompt.problem.problem_id}",
        )

    async def publish(self, weights: PublishedWeights) -> dict[str, float]:
        """Bring a version into every healthy engine; the node files are removed whether that succeeds or not.

        Returns:
            `weights/probe_max_abs_diff`; `timing/pause`, the longest that an engine sampled nothing meanwhile; and, since
            the last publication, averaged over engines: `timing/engines_idle`, without any group to work on, and
            `timing/engines_underfull`, with requests for less than half a batch although more groups may have waited.

        Raises:
            WeightTransferError: a proof failed.
            NoActorsLeft: every actor died.
        """
        try:
            pauses = await wait(
                self._of_all(lambda client: client.receive_weights(weights)),
                self._publish_timeout,
                what=f"policy version {weights.version} to reach every rollout actor",
            )
        finally:
            await self._discard(weights.version)
        probe = await weights.probe()
        differences = await wait(
            self._of_all(lambda client: client.prove_weights(probe)),
            self._publish_timeout,
            what=f"every rollout actor to prove policy version {weights.version}",
        )
        underfull = await wait(
            self._of_all(lambda client: client.take_underfull()),
            self._publish_timeout,
            what="every rollout actor to tell how full its engine was",
        )
        healthy = self._healthy()
        if not healthy:
            raise NoActorsLeft("every rollout actor died; see their logs")
        return {
            "timing/pause": max(pauses),
            "timing/engines_idle": sum(member.take_idle() for member in healthy) / len(healthy),
            "timing/engines_underfull": sum(underfull) / len(underfull),
            "weights/probe_max_abs_diff": max(differences),
        }

    async def shutdown(self) -> None:
        """End every actor."""
        await asyncio.gather(*(member.client.shutdown() for member in self._members))

    async def _discard(self, version: int) -> None:
        await wait(
            self._of_all(lambda client: client.discard_weights(version)),
            self._publish_timeout,
            what=f"the files of policy version {version} to be removed",
        )

    async def _of_all(self, call: Callable[[RolloutClient], Awaitable[T]]) -> list[T]:
        """Answers of all healthy actors; those that die meanwhile are left out."""

        async def one(member: _Member) -> list[T]:
            try:
                return [await call(member.client)]
            except ActorDied as death:
                self._bury(member, death)
                return []

        answers = await asyncio.gather(*(one(member) for member in self._healthy()))
        return [answer for of_member in answers for answer in of_member]

    async def _route(self, call: Callable[[RolloutClient], Awaitable[T]], *, what: str) -> T:
        while True:
            member = self._least_loaded()
            member.begin()
            try:
                return await wait(call(member.client), self._group_timeout, what=f"{what} from {member.client.name}")
            except ActorDied as death:
                self._bury(member, death)
            finally:
                member.end()

    def _least_loaded(self) -> _Member:
        healthy = self._healthy()
        if not healthy:
            raise NoActorsLeft("every rollout actor died; see their logs")
        return min(healthy, key=lambda member: member.in_flight)

    def _healthy(self) -> Sequence[_Member]:
        return [member for member in self._members if member.healthy]

    def _bury(self, member: _Member, death: ActorDied) -> None:
        if member.healthy:
            logger.warning("%s died; its prompts go to the others: %s", member.client.name, death)
        member.healthy = False
