"""Many rollout actors as one: work goes to the least loaded, the dead and the hung are replaced, their number may change.

The pool speaks to its actors through `RolloutClient`, so that real and simulated actors run under the same code.

    starting -> waiting for weights -> serving [-> draining] -> ended
             a publication ^, or what it left where that can still be had; proven in either case
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from actors.pool_crew import Crew
from actors.pool_member import ActorDied, ActorHung, Member, PoolLimits, RolloutClient, WeightsGone, in_a_line
from actors.pool_publication import Publication, publish_to, take_occupancy
from actors.pool_queue import WorkQueue
from ray_rl.deadlines import wait
from ray_rl.protocols import ActorStatus, CollectedGroup, MakeWeights, NoActorsLeft, PromptFailed, TransferBroke
from ray_rl.types import Prompt, ScoredSample
from ray_rl.weight_manifest import WeightTransferError

__all__ = ["ActorDied", "ActorHung", "ActorPool", "PoolLimits", "RolloutClient", "WeightsGone"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PLACES_PER_GROUP = 4
"""A place is a quarter of a group, so that a small evaluation request does not count as much as one."""
_STACKS_SECONDS = 5.0


class ActorPool:
    """Implements `ray_rl.protocols.RolloutPool`."""

    def __init__(
        self,
        factory: Callable[[int], RolloutClient],
        size: int,
        *,
        limits: PoolLimits,
        serves_loaded: bool = False,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Nothing is made yet (`start`).

        Args:
            factory: makes the client of actor i without waiting for anything. No i comes twice.
            size: actors that are wanted at first.
            limits: of work and of time.
            serves_loaded: whether actors serve with what they have loaded as long as nothing is published, for use without a
                learner. Else they wait for the first publication.
            warn: tells people what happened.
        """
        self._limits = limits
        self._queue = WorkQueue(_PLACES_PER_GROUP * limits.groups_in_flight)
        self._crew = Crew(factory, size, self._queue, limits=limits, serves_loaded=serves_loaded, warn=warn)
        self._died_before = 0
        """The last publication."""

    async def start(self) -> None:
        """Wait until every first actor has loaded its engine. When one fails, all are ended.

        Raises:
            DeadlineExceeded: one did not in time; whatever else kept one from starting comes as what it is.
        """
        await self._crew.start()

    async def shutdown(self) -> None:
        """End every actor, and the wait of whoever waits for one. Idempotent."""
        self._queue.refuse("the rollout actors were shut down")
        await self._crew.shutdown()

    @property
    def size(self) -> int:
        """Actors that are wanted."""
        return self._crew.size

    @property
    def waits_for_weights(self) -> bool:
        """Whether an actor that joined can only get weights by another publication."""
        return any(
            member.state == "waiting for weights" and not self._crew.reaches(member) for member in self._crew.members
        )

    @property
    def died(self) -> int:
        """Actors lost since the start."""
        return self._crew.died

    def resize(self, size: int) -> None:
        """As `RolloutPool.resize`. Those that only start or wait for weights go first, then those with the least to do.

        Raises:
            ValueError: of less than one actor.
        """
        if size < 1:
            raise ValueError(f"a pool of {size} actors; at least one is needed")
        self._crew.resize(size)

    def status(self) -> Sequence[ActorStatus]:
        """Every actor there is."""
        return [member.status for member in self._crew.members]

    async def stacks(self) -> dict[str, str]:
        """What every actor's process is doing, by name."""
        members = self._crew.members
        told = await asyncio.gather(
            *(wait(m.client.stacks(), _STACKS_SECONDS, what=f"{m.name} to tell its stacks") for m in members),
            return_exceptions=True,
        )
        return {
            member.name: text if isinstance(text, str) else f"no answer: {in_a_line(text)}"
            for member, text in zip(members, told, strict=True)
        }

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """As `RolloutPool.collect`."""
        return await self._routed(
            lambda member: member.collect(prompt, self._limits.group_timeout),
            _PLACES_PER_GROUP,
            what=f"prompt {prompt.prompt_id}",
        )

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """As `RolloutPool.evaluate`."""
        what = f"evaluation prompt {prompt.problem.problem_id}"
        return await self._routed(
            lambda member: member.call(
                lambda client: client.evaluate(prompt, samples, temperature),
                self._limits.group_timeout,
                what=f"the answers to {what} from {member.name}",
            ),
            min(samples, self._queue.places),
            what=what,
        )

    async def publish(self, make: MakeWeights) -> dict[str, float]:
        """As `RolloutPool.publish`. Work in flight goes on. What `make` raises leaves the actors what they have.

        Returns:
            `weights/probe_max_abs_diff`; `timing/pause`, the longest that an engine sampled nothing meanwhile; `pool/actors`
            that serve and `pool/died`, since the last publication; and what `take_occupancy` tells.
        """
        async with self._crew.publishing():
            publication = await self._until_proven(make)
            self._crew.take_in(publication)
        occupancy = await take_occupancy(publication.differences, self._limits.publish_timeout)
        died, self._died_before = self.died - self._died_before, self.died
        return {
            **occupancy,
            "timing/pause": max(publication.pauses[member] for member in publication.differences),
            "weights/probe_max_abs_diff": max(publication.differences.values()),
            "pool/actors": float(self._queue.serving),
            "pool/died": float(died),
        }

    async def _until_proven(self, make: MakeWeights) -> Publication:
        """Publish, and once more where everyone died of it; who fails is replaced."""
        for _ in range(self._limits.max_attempts):
            members = await self._crew.loaded()
            try:
                publication = await publish_to(members, make, self._limits.publish_timeout)
            except TransferBroke as broken:
                for member in members:
                    self._crew.bury(member, broken)
                raise
            for member, error in publication.failures.items():
                self._crew.bury(member, error)
            if publication.differences:
                return publication
            for error in publication.failures.values():
                if not isinstance(error, (ActorDied, WeightsGone)):
                    raise error
        raise NoActorsLeft(
            f"{self._limits.max_attempts} times every rollout actor died of new weights{self._crew.last_ends}"
        )

    async def _routed(self, ask: Callable[[Member], Awaitable[T]], need: int, *, what: str) -> T:
        ends: list[str] = []
        while len(ends) < (attempts := self._limits.max_attempts):
            # The last attempt has an actor to itself: what dies with it then is this prompt's fault and nobody else's.
            places = self._queue.places if len(ends) == attempts - 1 > 0 else need
            member = await self._queue.take(places, first=bool(ends))
            try:
                if member.state == "ended":
                    continue  # since it was handed over
                return await ask(member)
            except ActorDied as error:
                ends.append(f"{member.name}: {in_a_line(error)}")
                self._crew.bury(member, error)
            except WeightTransferError as error:  # no prompt can be blamed for that
                self._crew.bury(member, error)
            finally:
                self._queue.give(member, places)
                if member.state == "draining" and member.load == 0:
                    self._crew.retire(member)
        raise PromptFailed(f"{what} was in {len(ends)} rollout actors that died or hung: {'; '.join(ends)}")
