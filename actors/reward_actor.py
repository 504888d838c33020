"""Reward actors: a `ProcessPoolScorer` behind Ray, and the scorer that shares work among them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.grader_process import START_TIMEOUT, PooledRewardConfig
from actors.rewards import check_python_function
from actors.scoring import InPlaceScorer, ProcessPoolScorer, Scorer
from ray_rl.config.reward import ExactRewardConfig, PythonRewardConfig, RewardConfig
from ray_rl.config.run import RunConfig
from ray_rl.deadlines import wait
from ray_rl.errors import RunError
from ray_rl.types import Reward, ScoringItem

MAX_BATCH = 32
"""Most items in one call: several actors share a group, and a lost actor loses little."""
MAX_RESTARTS = 3
CONCURRENT_CALLS = 64
AVOID_AFTER_LOSS = 60.0
"""Seconds for which an actor that was lost gets no work while another one is there."""
RESTART_POLL = 0.5
"""Seconds between questions whether an actor is back."""

_log = logging.getLogger(__name__)


class RewardActorsLost(RunError):
    """A batch found no living reward actor, twice; the message names the actors."""


@ray.remote(num_gpus=0, max_restarts=MAX_RESTARTS, max_concurrency=CONCURRENT_CALLS)
class RewardActor:
    """A process pool that scores, reachable over Ray. It can be restarted: it has no state but its counters."""

    def __init__(self, config: PooledRewardConfig) -> None:
        self._scorer = ProcessPoolScorer(config)

    async def start(self) -> None:
        """Bring the grader processes up. Raises GraderStartError with the reason when they don't come."""
        await self._scorer.start()

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`."""
        return await self._scorer.score(items)

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`."""
        return await self._scorer.final_answers(texts)

    async def counters(self) -> dict[str, int]:
        """Gradings and failures by reason since this actor (re)started."""
        return self._scorer.counters()

    async def close(self) -> None:
        """Kill the grader processes; they would also die with the actor."""
        self._scorer.close()


def create_reward_actors(config: RunConfig) -> list[Any]:
    """Ask Ray for the reward actors of a run, without waiting for them; none for a reward that is scored in place.

    Raises:
        RewardFunctionError: `reward.function` names no usable function.
    """
    reward = config.reward
    if isinstance(reward, ExactRewardConfig):
        return []
    if isinstance(reward, PythonRewardConfig):
        check_python_function(reward.function)
    options = RewardActor.options(num_cpus=config.reward_actors.cpus_per_actor)  # type: ignore[attr-defined]
    return [options.remote(reward) for _ in range(config.reward_actors.actors)]


async def start_reward_actors(handles: Sequence[Any], seconds: float) -> None:
    """Wait until all actors are placed and their grader processes are up.

    Raises:
        DeadlineExceeded: not within `seconds`; most often the cluster has no room for them.
        GraderStartError: the verifier cannot be imported (as a RayTaskError that is one).
    """
    started = asyncio.gather(*(handle.start.remote() for handle in handles))
    await wait(started, seconds, what=f"{len(handles)} reward actors to be placed and to start")


def make_scorer(config: RewardConfig, handles: Sequence[Any], timeout: float | None = None) -> Scorer:
    """The scorer for a rollout.

    Args:
        config: the reward section.
        handles: reward actors; unused when the reward is scored in place.
        timeout: seconds one batch may take at its actor, other callers' work included. Unset: twice what a batch takes
            whose every grading times out.
    """
    if isinstance(config, ExactRewardConfig):
        return InPlaceScorer(config)
    rounds = math.ceil(MAX_BATCH / config.processes)
    return RemoteScorer(handles, timeout or START_TIMEOUT + 2 * rounds * config.timeout)


class RemoteScorer:
    """Sends batches to the reward actor on which this scorer has the least work. It can be pickled while idle."""

    def __init__(self, handles: Sequence[Any], timeout: float) -> None:
        """`timeout`: seconds one batch may take. Raises ValueError without any actor."""
        if not handles:
            raise ValueError("a RemoteScorer needs at least one reward actor")
        self._handles = list(handles)
        self._timeout = timeout
        self._loads = [0] * len(self._handles)
        self._lost_at: dict[int, float] = {}

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`.

        Raises:
            DeadlineExceeded: a batch took longer than `timeout`; names the actor.
            RewardActorsLost: an actor died with a batch, and so did the one that got it next.
        """
        return await self._in_batches("score", items)

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`; raises as `score` does."""
        return await self._in_batches("final_answers", texts)

    async def _in_batches(self, method: str, subjects: Sequence[Any]) -> list[Any]:
        size = max(1, min(MAX_BATCH, math.ceil(len(subjects) / len(self._handles))))
        batches = [subjects[start : start + size] for start in range(0, len(subjects), size)]
        answers = await asyncio.gather(*(self._send(method, batch) for batch in batches))
        return [answer for batch in answers for answer in batch]

    async def _send(self, method: str, batch: Sequence[Any]) -> list[Any]:
        first = self._least_loaded()
        try:
            return await self._ask(first, method, batch)
        except RayActorError as error:
            _log.warning("reward actor %d was lost with a batch of %d; trying once more: %s", first, len(batch), error)
            self._lost_at[first] = time.monotonic()
        second = self._least_loaded()
        try:
            await wait(self._until_back(second), self._timeout, what=f"reward actor {second} to be restarted")
            return await self._ask(second, method, batch)
        except RayActorError as error:
            self._lost_at[second] = time.monotonic()
            raise RewardActorsLost(
                f"reward actor {first} died with a batch of {len(batch)}, then reward actor {second}: {error}"
            ) from error

    async def _ask(self, index: int, method: str, batch: Sequence[Any]) -> list[Any]:
        self._loads[index] += len(batch)
        try:
            call = getattr(self._handles[index], method).remote(batch)
            what = f"{method} of {len(batch)} items by reward actor {index}"
            answers: list[Any] = await wait(call, self._timeout, what=what)
            return answers
        finally:
            self._loads[index] -= len(batch)

    async def _until_back(self, index: int) -> None:
        """Ray refuses calls to an actor while it restarts it. Raises ActorDiedError when it won't come back."""
        while True:
            try:
                await self._handles[index].start.remote()
                return
            except ActorUnavailableError:
                await asyncio.sleep(RESTART_POLL)

    def _least_loaded(self) -> int:
        """Among those that were not lost of late: one that is gone for good would look idle for ever."""
        everyone = range(len(self._handles))
        recently = time.monotonic() - AVOID_AFTER_LOSS
        trusted = [index for index in everyone if self._lost_at.get(index, -math.inf) < recently]
        if not trusted:
            return min(everyone, key=lambda index: self._lost_at[index])
        return min(trusted, key=lambda index: self._loads[index])
