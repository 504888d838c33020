"""The client through which the pool speaks to a rollout actor, and what it makes of Ray's errors."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.engine import EngineDied
from actors.pool_member import ActorDied, in_a_line
from actors.rollout_actor import STACKS_GROUP, RolloutActor
from ray_rl.config import RunConfig
from ray_rl.deadlines import DeadlineExceeded, wait
from ray_rl.errors import RunError, first_error
from ray_rl.protocols import CollectedGroup, PublishedWeights, Receiver
from ray_rl.run_logs import log_file
from ray_rl.types import Prompt, ScoredSample
from ray_rl.weight_manifest import Probe

logger = logging.getLogger(__name__)

_END_SECONDS = 30.0
_DEATHS = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)
"""What Ray raises where an actor, or its answer, is gone with its process or node."""


class RayRolloutClient:
    """One `RolloutActor`, as the pool sees it (`actors.pool_member.RolloutClient`)."""

    def __init__(self, handle: Any, name: str) -> None:
        """Wrap the handle of an actor that may still be starting."""
        self._handle = handle
        self._home: str | None = None
        self.name = name

    @property
    def handle(self) -> Any:
        """The Ray actor."""
        return self._handle

    @property
    def home(self) -> str:
        """As `Receiver.home`."""
        if self._home is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._home

    @property
    def receiver(self) -> Receiver:
        """The actor, for the sending end of a publication."""
        return Receiver(home=self.home, handle=self._handle)

    async def start(self) -> None:
        """Wait until the engine is loaded."""
        await _result(self._handle.start.remote())
        self._home = await _result(self._handle.weight_file_identity.remote())

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """One group."""
        group, summary = self._handle.collect.remote(prompt)
        try:
            return CollectedGroup(prompt=prompt, ref=group, summary=await _result(summary))
        except asyncio.CancelledError:
            ray.cancel(summary)  # else the engine would go on sampling what nobody wants
            raise

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers."""
        return await _result(self._handle.evaluate.remote(prompt, samples, temperature))

    async def receive_weights(self, weights: PublishedWeights) -> float:
        """Take new weights; seconds of the engine's pause."""
        return await _result(self._handle.receive_weights.remote(weights.payload))

    async def prove_weights(self, probe: Probe) -> float:
        """The probe's largest difference."""
        return await _result(self._handle.prove_weights.remote(probe))

    async def take_underfull(self) -> float:
        """Seconds in which the engine's batch was less than half full although groups may have waited."""
        return await _result(self._handle.take_underfull.remote())

    async def stacks(self) -> str:
        """What the actor's process is doing."""
        return await _result(self._handle.stacks.remote())

    async def shutdown(self) -> None:
        """End the engine, then the actor. One that has not started or does not answer is killed, and its engine goes with it."""
        try:
            if self._home is not None:
                await wait(_result(self._handle.shutdown.remote()), _END_SECONDS, what=f"{self.name} to end its engine")
        except (RunError, RayError) as error:
            logger.info("%s did not end by itself: %s", self.name, in_a_line(error))
        finally:
            ray.kill(self._handle)


def create_rollout_client(
    config: RunConfig,
    model_path: str,
    run_id: str,
    index: int,
    *,
    reward_actors: Sequence[Any],
    step: int = 0,
    logs: Path | None = None,
    kind: type[RolloutActor] = RolloutActor,
) -> RayRolloutClient:
    """Ask Ray for rollout actor `index` with the resources of its engine, without waiting for them.

    Its sampling follows from the run's seed, the index and the step that the run (re)starts after, so that a resumed run
    and a replacement, whose index is another, draw new numbers.
    """
    # Ray prints the error of each answer that nobody fetched; of a group that failed here the summary's is enough.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    rollout = config.rollout
    log = log_file(logs, f"rollout-{index}")
    handle = (
        ray.remote(concurrency_groups={STACKS_GROUP: 1})(kind)
        .options(
            # Its own, and no placement group's: so Ray's autoscaler finds or frees a node for each.
            num_cpus=rollout.cpus_per_actor,
            num_gpus=rollout.gpus_per_actor,
            resources=rollout.resources,
            label_selector=rollout.labels,
            # The pool replaces it: what Ray would restart has neither engine nor weights.
            max_restarts=0,
            # Groups, answers to evaluation prompts, and room for what must not wait behind them.
            max_concurrency=100 + 8 * rollout.most_groups,
        )
        .remote(config, model_path, run_id, _engine_seed(config.seed, step, index), reward_actors, log)
    )
    return RayRolloutClient(handle, f"rollout actor {index}")


def _engine_seed(seed: int, step: int, index: int) -> int:
    return random.Random(f"{seed}:{step}:{index}").randrange(2**31)


async def _result(ref: Any) -> Any:
    """What a call to an actor gives. The deadline is the caller's (`RolloutClient`).

    Raises:
        ActorDied: the actor, its engine or the answer is gone.
        RunError: what the actor raised, as it was there; its other errors come as Ray's, with its traceback.
    """
    try:
        return await ref
    except RayTaskError as error:
        cause = _root(error)
        if isinstance(cause, EngineDied):
            raise ActorDied(str(cause)) from error
        if isinstance(cause, DeadlineExceeded):
            raise RunError(str(cause)) from error
        if isinstance(cause, RunError):
            raise cause from error
        raise
    except _DEATHS as error:
        raise ActorDied(_cause_of_death(error)) from error


def _cause_of_death(error: BaseException) -> str:
    """The line that says why, without Ray's guesses; else the first."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "because" in line), lines[0]).partition(" Some common causes")[0].strip()


def _root(error: BaseException) -> BaseException:
    """What a task failed with, out of the wrappings of Ray and of groups of tasks."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return first_error(error)
