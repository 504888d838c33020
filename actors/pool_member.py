"""One rollout actor in the pool: what the pool asks of it, its state, its load, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from ray_rl.deadlines import DeadlineExceeded, wait
from ray_rl.errors import RunError
from ray_rl.protocols import ActorStatus, CollectedGroup, PublishedWeights, Receiver
from ray_rl.types import Prompt, ScoredSample
from ray_rl.weight_manifest import Probe

T = TypeVar("T")
State = Literal["starting", "waiting for weights", "serving", "draining", "ended"]


class ActorDied(RunError):
    """A rollout actor, or its engine's process, is gone; the message says what is known of it."""


class ActorHung(ActorDied, DeadlineExceeded):
    """A rollout actor did not do in time what the pool asked of it."""


class WeightsGone(RunError):
    """Published weights can't be had any more where this actor is. Nothing is wrong with the actor: the next ones may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """How much at once, and how long at most (seconds)."""

    groups_in_flight: int
    """Groups that one actor works on at once."""
    start_timeout: float
    """From the making of an actor until its engine is loaded, the wait for its resources included."""
    group_timeout: float
    """For one group or evaluation request; then its actor counts as hung."""
    publish_timeout: float
    """For one actor to receive a version, and again to prove it."""
    outage_timeout: float
    """Without any serving actor, until those who wait for one are told."""
    max_attempts: int
    """Actors that one prompt may cost."""
    restart_delay: float = 1.0
    """Before the place of an actor that never served is filled again; doubles each time, up to a minute."""


class RolloutClient(Protocol):
    """One rollout actor, as the pool sees it. Each verb raises `ActorDied` when its process, or its engine's, is gone.

    No verb has a deadline; whoever calls it has. A deadline that passes inside the actor is an error of its work like any other,
    but no `DeadlineExceeded`, which says that the actor hangs.
    """

    name: str

    @property
    def home(self) -> str:
        """As `Receiver.home`; known after `start`."""

    @property
    def receiver(self) -> Receiver:
        """The actor, as the sending end of a publication sees it; after `start`."""

    async def start(self) -> None:
        """Wait until the engine is loaded."""

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """One group."""

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers."""

    async def receive_weights(self, weights: PublishedWeights) -> float:
        """Take new weights and go on. Returns the seconds in which the engine sampled nothing.

        Raises:
            WeightTransferError: what arrived is not what was published.
            WeightsGone: they can't be had any more here.
        """

    async def prove_weights(self, probe: Probe) -> float:
        """Largest difference between the engine's log-probabilities and the probe's.

        Raises:
            WeightTransferError: it is too large.
        """

    async def take_underfull(self) -> float:
        """Seconds since the last call in which the engine's batch was less than half full although groups may have waited."""

    async def stacks(self) -> str:
        """What the actor's threads and tasks are doing."""

    async def shutdown(self) -> None:
        """End the actor and its engine, by force where they do not end by themselves."""


class Member:
    """An actor of the pool, from its making to its end. It knows nothing of the others."""

    def __init__(self, client: RolloutClient) -> None:
        """Of an actor that is starting."""
        self.client = client
        self.name = client.name
        self.load = 0
        """Places that are taken (`set_load`)."""
        self.missed: PublishedWeights | None = None
        """What it could not get although it should have reached it."""
        self.has_served = False
        self._state: State = "starting"
        self._end = ""
        self._groups = 0
        self._served = 0
        self._calls: set[asyncio.Future[Any]] = set()
        self._idle_since = 0.0
        self._idle_seconds = 0.0

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def is_loaded(self) -> bool:
        """Whether publications go to it."""
        return self._state in ("waiting for weights", "serving")

    @property
    def status(self) -> ActorStatus:
        """For `ray-rl status`."""
        return ActorStatus(name=self.name, state=self._state, groups=self._groups, served=self._served)

    def set_load(self, load: int) -> None:
        """So many places are taken from now on."""
        now = time.monotonic()
        if self.load == 0:
            self._idle_seconds += now - self._idle_since
        self.load, self._idle_since = load, now

    def take_idle(self) -> float:
        """Seconds since the last call, or since it began to serve, in which no place was taken."""
        self.set_load(self.load)
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds

    async def start(self, seconds: float) -> None:
        """Load the engine; then it waits for weights."""
        await self.call(lambda client: client.start(), seconds, what=f"{self.name} to load its engine")
        self._state = "waiting for weights"

    def serve(self) -> None:
        """Its weights are proven."""
        self._state, self.has_served = "serving", True
        self._idle_since, self._idle_seconds = time.monotonic(), 0.0

    def drain(self) -> None:
        """It gets no new work, and ends when what it has is done."""
        self._state = "draining"

    def end(self, why: str) -> bool:
        """Give up everything that is asked of it at once. Returns whether this is news.

        Args:
            why: what each of these calls raises, as an `ActorDied`.
        """
        if self._state == "ended":
            return False
        self._state, self._end = "ended", why
        for call in self._calls:
            call.cancel()
        return True

    async def collect(self, prompt: Prompt, seconds: float) -> CollectedGroup:
        """One group; raises as `call` does."""
        what = f"the group of prompt {prompt.prompt_id} from {self.name}"
        self._groups += 1
        try:
            group = await self.call(lambda client: client.collect(prompt), seconds, what=what)
        finally:
            self._groups -= 1
        self._served += 1
        return group

    async def call(self, verb: Callable[[RolloutClient], Awaitable[T]], seconds: float, *, what: str) -> T:
        """Ask something of the actor.

        Args:
            verb: what.
            seconds: until it counts as hung.
            what: completes the sentence "waited 12 s for ...".

        Raises:
            ActorHung: no answer came in time.
            ActorDied: it is gone, or ended (`end`) meanwhile: then its answer counts no more.
        """
        if self._state == "ended":
            raise ActorDied(self._end)

        async def ask() -> T:
            return await wait(verb(self.client), seconds, what=what)

        call = asyncio.create_task(ask())
        self._calls.add(call)
        try:
            answer = await call
        except DeadlineExceeded as late:
            raise ActorHung(str(late)) from late
        except asyncio.CancelledError:
            if self._state != "ended" or _is_cancelled():
                raise
        finally:
            self._calls.discard(call)
        if self._state == "ended":
            raise ActorDied(self._end)
        return answer


def _is_cancelled() -> bool:
    """Whether the task that runs was itself cancelled, and not merely what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def in_a_line(error: BaseException) -> str:
    """An error for people: a run's own errors are written for them; of others, Ray's with a traceback say it in the end."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, RunError) else lines[-1]
