"""Reward actors: a `ProcessPoolScorer` behind Ray, and the scorer that shares work among them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from actors.grader_process import START_TIMEOUT, GraderStartError, PooledRewardConfig
from actors.rewards import check_python_function
from actors.scoring import InPlaceScorer, ProcessPoolScorer, Scorer
from actors.verdicts import shortened
from ray_rl.config.reward import ExactRewardConfig, PythonRewardConfig, RewardConfig
from ray_rl.config.run import RunConfig
from ray_rl.deadlines import Deadline, DeadlineExceeded, first_of, wait
from ray_rl.run_logs import begin_log, log_file
from ray_rl.types import Reward, ScoringItem

MAX_BATCH = 32
"""Most items in one call: several actors share a group, and a lost actor loses little."""
CONCURRENT_CALLS = 64
END_TIMEOUT = 5.0
"""Seconds in which a reward actor must have killed its graders before it is itself killed."""
AVOID_AFTER_LOSS = 60.0
"""Seconds for which an actor that was lost gets no work while another one is there."""
RESTART_POLL = 0.5
"""Seconds between questions whether an actor is back."""

T = TypeVar("T")

_PROGRESS_GROUP = "progress"
_PROGRESS_SECONDS = 10.0
_SILENT = -1
_WHY_LATE = "its node is overloaded or cannot be reached; see its log among Ray's"
_log = logging.getLogger(__name__)


@ray.remote(num_gpus=0, max_restarts=-1, max_concurrency=CONCURRENT_CALLS, concurrency_groups={_PROGRESS_GROUP: 1})
class RewardActor:
    """A process pool that scores, reachable over Ray. It can be restarted: it has no state but its counters."""

    def __init__(self, config: PooledRewardConfig, log: Path | None = None) -> None:
        begin_log(log)
        self._scorer = ProcessPoolScorer(config)

    async def start(self) -> None:
        """Bring the grader processes up. Raises GraderStartError with the reason when they don't come."""
        await self._scorer.start()
        _log.info("the graders are up")

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`."""
        return await self._scorer.score(items)

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`."""
        return await self._scorer.final_answers(texts)

    async def counters(self) -> dict[str, int]:
        """Gradings and failures by reason since this actor (re)started."""
        return self._scorer.counters()

    @ray.method(concurrency_group=_PROGRESS_GROUP)
    async def answered(self) -> int:
        """Jobs that the graders are done with; answers also while calls of `score` queue."""
        return self._scorer.answered

    async def close(self) -> None:
        """Kill the grader processes; they would also die with the actor."""
        self._scorer.close()


def create_reward_actors(config: RunConfig, logs: Path | None = None) -> list[Any]:
    """Ask Ray for the reward actors of a run, without waiting for them; none for a reward that is scored in place.

    Args:
        config: of the run.
        logs: the run's logs/, if it has a folder.

    Raises:
        RewardFunctionError: `reward.function` names no usable function.
    """
    reward = config.reward
    if isinstance(reward, ExactRewardConfig):
        return []
    if isinstance(reward, PythonRewardConfig):
        check_python_function(reward.function)
    actors = config.reward_actors
    options = RewardActor.options(  # type: ignore[attr-defined]
        num_cpus=actors.cpus_per_actor, resources=actors.resources, label_selector=actors.labels
    )
    return [options.remote(reward, log_file(logs, f"reward-{index}")) for index in range(actors.actors)]


async def start_reward_actors(handles: Sequence[Any], seconds: float) -> None:
    """Wait until all actors are placed and their grader processes are up.

    Raises:
        DeadlineExceeded: not within `seconds`; most often the cluster has no room for them.
        GraderStartError: the verifier cannot be imported (as a RayTaskError that is one).
    """
    started = asyncio.gather(*(handle.start.remote() for handle in handles))
    await wait(started, seconds, what=f"{len(handles)} reward actors to be placed and to start")


async def end_reward_actors(handles: Sequence[Any]) -> None:
    """Let the actors kill their grader processes and what these have started, then end the actors. One that hangs is killed."""

    async def end(handle: Any) -> None:
        try:
            await wait(handle.close.remote(), END_TIMEOUT, what="a reward actor to end its grader processes")
        except (RayError, DeadlineExceeded) as error:
            _log.info("a reward actor did not end by itself: %s", error)
        finally:
            ray.kill(handle)

    await asyncio.gather(*(end(handle) for handle in handles))


def make_scorer(config: RewardConfig, handles: Sequence[Any], timeout: float | None = None) -> Scorer:
    """The scorer for a rollout.

    Args:
        config: the reward section.
        handles: reward actors; unused when the reward is scored in place.
        timeout: of `RemoteScorer`. Unset: twice what a batch takes whose every grading times out.
    """
    if isinstance(config, ExactRewardConfig):
        return InPlaceScorer(config)
    rounds = math.ceil(MAX_BATCH / config.processes)
    return RemoteScorer(handles, timeout or START_TIMEOUT + 2 * rounds * config.timeout, failure=config.failure)


class RemoteScorer:
    """Sends batches to the reward actor on which this scorer has the least work. It can be pickled while idle.

    What happens to the actors never becomes an error of its callers: a batch whose actor was lost is tried once more, and
    a batch without an answer consists of failed gradings.
    """

    def __init__(self, handles: Sequence[Any], timeout: float, *, failure: float = 0.0) -> None:
        """Of a run's reward actors.

        Args:
            handles: of the actors.
            timeout: seconds for which an actor may owe a batch without getting on with any. How many batches queue before
                this one is no fault of anybody's.
            failure: reward of items whose batch got no answer.

        Raises:
            ValueError: there is no actor.
        """
        if not handles:
            raise ValueError("a RemoteScorer needs at least one reward actor")
        self._handles = list(handles)
        self._timeout = timeout
        self._failure = failure
        self._loads = [0] * len(self._handles)
        self._lost_at: dict[int, float] = {}

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`."""
        return await self._in_batches("score", items, lambda reason: Reward(value=self._failure, failure=reason))

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`."""
        return await self._in_batches("final_answers", texts, lambda _: "")

    async def _in_batches(self, method: str, subjects: Sequence[Any], failed: Callable[[str], T]) -> list[T]:
        size = max(1, min(MAX_BATCH, math.ceil(len(subjects) / len(self._handles))))
        batches = [subjects[start : start + size] for start in range(0, len(subjects), size)]
        answers = await asyncio.gather(*(self._answers(method, batch, failed) for batch in batches))
        return [answer for batch in answers for answer in batch]

    async def _answers(self, method: str, batch: Sequence[Any], failed: Callable[[str], T]) -> list[T]:
        try:
            return await self._send(method, batch)
        except _Unanswered as reason:
            _log.warning("%s of %d items failed: %s", method, len(batch), reason)
            return [failed(str(reason))] * len(batch)

    async def _send(self, method: str, batch: Sequence[Any]) -> list[Any]:
        """Raises _Unanswered: not in the time it may take, or not by the two actors that it may cost."""
        first = self._least_loaded()
        try:
            return await self._ask(first, method, batch)
        except _Lost as error:
            lost = error
            _log.warning("%s was lost with a batch of %d; trying once more: %s", _name(first), len(batch), lost)
        second = self._least_loaded()
        try:
            back = self._until_back(second)
            await self._call(second, wait(back, self._timeout, what=f"{_name(second)} to be restarted"))
            return await self._ask(second, method, batch)
        except _Lost as error:
            reason = f"reward actor lost: {_name(first)} with a batch of {len(batch)} ({lost}), then {_name(second)} ({error})"
            raise _Unanswered(reason) from error

    async def _ask(self, index: int, method: str, batch: Sequence[Any]) -> list[Any]:
        self._loads[index] += len(batch)
        try:
            answers = getattr(self._handles[index], method).remote(batch)
            what = f"{method} of {len(batch)} items by {_name(index)}"
            return await self._call(index, self._while_it_works(index, answers, what))
        finally:
            self._loads[index] -= len(batch)

    async def _while_it_works(self, index: int, answers: Awaitable[T], what: str) -> T:
        """Wait as long as the actor gets on with something. Raises DeadlineExceeded when it does not."""
        task = asyncio.ensure_future(answers)
        seen, deadline = _SILENT, Deadline(self._timeout, what=what, causes=_WHY_LATE)
        try:
            while not await first_of([task], self._timeout / 2):
                now = await self._answered(index)
                if now != seen:
                    seen, deadline = now, Deadline(self._timeout, what=what, causes=_WHY_LATE)
                deadline.check()
            return task.result()
        finally:
            task.cancel()

    async def _answered(self, index: int) -> int:
        """How many jobs an actor is done with; _SILENT: it does not say."""
        seconds = min(_PROGRESS_SECONDS, self._timeout / 2)
        try:
            return await wait(self._handles[index].answered.remote(), seconds, what=f"{_name(index)} to say how it is")
        except (RayError, DeadlineExceeded):
            return _SILENT

    async def _call(self, index: int, answer: Awaitable[T]) -> T:
        """What an actor answers. Raises _Lost when it is gone or can't bring its graders up, _Unanswered when it is late."""
        try:
            return await answer
        except (RayError, DeadlineExceeded, GraderStartError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(error, RayTaskError) and not isinstance(cause, DeadlineExceeded | GraderStartError):
                raise  # a fault of this program, not something that happened to the actor
            self._lost_at[index] = time.monotonic()
            said = shortened(" ".join(str(cause).split()))
            late = isinstance(cause, DeadlineExceeded)
            raise (_Unanswered(f"reward actor late: {said}") if late else _Lost(said)) from error

    async def _until_back(self, index: int) -> None:
        """Ray refuses calls to an actor while it restarts it. Raises ActorDiedError when it won't come back."""
        while True:
            try:
                return await wait(self._handles[index].start.remote(), self._timeout, what=f"{_name(index)} to start")
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


class _Unanswered(Exception):
    """A batch got no answers; the message is the reason that the record keeps."""


class _Lost(_Unanswered):
    """Nor will it get any from this actor; another one may be asked."""


def _name(index: int) -> str:
    return f"reward actor {index}"
