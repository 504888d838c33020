"""Where verifiers run: in place when they are cheap and trusted, else in processes that can be killed."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import pickle
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from actors.grader_process import (
    START_TIMEOUT,
    GraderFailed,
    GraderProcess,
    GraderStartError,
    Job,
    PooledRewardConfig,
)
from actors.rewards import final_answer_of, make_verifier
from actors.verdicts import shortened
from ray_rl.config.reward import ExactRewardConfig
from ray_rl.deadlines import wait
from ray_rl.types import Reward, ScoringItem

_END_SECONDS = 10.0

_log = logging.getLogger(__name__)


class Scorer(Protocol):
    """What a rollout needs of rewards."""

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """One reward per item, in the same order. A failed grading is a `Reward` with `failure` set, not an error."""

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """Each completion's final answer as majority votes compare it; empty without one, or when reading it failed."""


class InPlaceScorer:
    """Scores in the caller's process, for verifiers that are quick and cannot hang."""

    def __init__(self, config: ExactRewardConfig) -> None:
        self._config = config
        self._verify = make_verifier(config)
        self._tally = _Tally()

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`."""
        return [self._tally.count(item, self._verify(item)) for item in items]

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`."""
        return [final_answer_of(self._config, text) for text in texts]

    def counters(self) -> dict[str, int]:
        """``graded`` and, per reason, ``failed/<reason>``."""
        return self._tally.counters()


class ProcessPoolScorer:
    """Scores in `config.processes` killable processes, with `config.timeout` seconds per item once its grading starts.

    The processes come up in the background from construction on. `close` kills them; so does any end of this process.
    """

    def __init__(self, config: PooledRewardConfig) -> None:
        self._config = config
        self._graders = [GraderProcess(config) for _ in range(config.processes)]
        self._started: list[Future[None]] = [Future() for _ in self._graders]
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting = 0
        self._answered = 0
        self._closed = False
        self._tally = _Tally()
        self._threads = [
            threading.Thread(target=self._serve, args=(grader, started), name="grader", daemon=True)
            for grader, started in zip(self._graders, self._started, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    async def start(self) -> None:
        """Wait until all processes are up: a verifier that cannot even be imported is known before it is needed.

        Raises:
            GraderStartError: the reason, as the process gave it.
        """
        started = asyncio.gather(*(asyncio.wrap_future(future) for future in self._started))
        await wait(started, 2 * START_TIMEOUT, what=f"{len(self._started)} grader processes to start")

    async def score(self, items: Sequence[ScoringItem]) -> list[Reward]:
        """See `Scorer.score`.

        Raises:
            DeadlineExceeded: not done although every process deadline has passed; something else is broken.
            RuntimeError: the scorer is closed.
        """
        answers = await self._ask_all(items)
        rewards = [
            answer if isinstance(answer, Reward) else Reward(value=self._config.failure, failure=str(answer))
            for answer in answers
        ]
        return [self._tally.count(item, reward) for item, reward in zip(items, rewards, strict=True)]

    async def final_answers(self, texts: Sequence[str]) -> list[str]:
        """See `Scorer.final_answers`; raises as `score` does."""
        answers = await self._ask_all(texts)
        for text, answer in zip(texts, answers, strict=True):
            if not isinstance(answer, str):
                _log.warning("reading the final answer failed: %s (completion %r)", answer, shortened(text))
        return [answer if isinstance(answer, str) else "" for answer in answers]

    def counters(self) -> dict[str, int]:
        """``graded`` and, per reason, ``failed/<reason>``."""
        return self._tally.counters()

    @property
    def answered(self) -> int:
        """Jobs that the processes are done with, whatever came of them: while it grows, the scorer works."""
        return self._answered

    def close(self) -> None:
        """Kill the processes, whatever they are doing. What was waiting fails. Idempotent."""
        atexit.unregister(self.close)
        self._closed = True
        for grader in self._graders:
            grader.close()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join(_END_SECONDS)

    async def _ask_all(self, jobs: Sequence[Job]) -> list[object]:
        """An answer, or the error in place of it, for each job."""
        if self._closed:
            raise RuntimeError("this scorer is closed")
        requests = [_Request(pickle.dumps(job), Future()) for job in jobs]
        self._waiting += len(requests)
        rounds = math.ceil(self._waiting / len(self._graders))
        for request in requests:
            self._requests.put(request)
        answers = asyncio.gather(*(self._answer(request) for request in requests))
        seconds = rounds * (START_TIMEOUT + self._config.timeout)
        try:
            return await wait(answers, seconds, what=f"{len(jobs)} gradings by {len(self._graders)} processes")
        finally:
            self._waiting -= len(requests)

    async def _answer(self, request: _Request) -> object:
        try:
            return await asyncio.wrap_future(request.answer)
        finally:
            self._answered += 1

    def _serve(self, grader: GraderProcess, started: Future[None]) -> None:
        """The life of one thread: mostly waiting for its process, which the kernel kills when this thread ends."""
        try:
            grader.start()
            started.set_result(None)
        except GraderStartError as error:
            started.set_exception(error)
        while (request := self._requests.get()) is not None:
            if not request.answer.set_running_or_notify_cancel():
                continue
            try:
                request.answer.set_result(grader.ask(request.job, self._config.timeout))
            except (GraderFailed, GraderStartError) as failure:
                request.answer.set_result(failure)


@dataclass(frozen=True, slots=True)
class _Request:
    job: bytes
    """A pickled `Job`: whoever asks learns that something cannot be pickled, not the thread."""
    answer: Future[object]


class _Tally:
    """Counts gradings and logs the failed ones."""

    def __init__(self) -> None:
        self._graded = 0
        self._failed: Counter[str] = Counter()

    def count(self, item: ScoringItem, reward: Reward) -> Reward:
        """Returns the reward as it came."""
        self._graded += 1
        if reward.failure is not None:
            # What precedes the colon names the reason, what follows differs from item to item.
            self._failed[reward.failure.partition(":")[0]] += 1
            text, problem = shortened(item.completion_text), item.problem.problem_id
            _log.warning("grading failed: %s (problem %s, completion %r)", reward.failure, problem, text)
        return reward

    def counters(self) -> dict[str, int]:
        return {"graded": self._graded, **{f"failed/{reason}": count for reason, count in self._failed.items()}}
