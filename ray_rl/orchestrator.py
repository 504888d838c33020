"""The two loops of a run, and what happens around them.

      prompts -> collect loop -> StalenessBuffer -> train loop -> learner.train
                    ^                                              |
                    +---- pool (new weights) <- learner.publish <--+

The collect loop keeps as many groups in flight as the buffer admits and the pool can work on. The train loop takes a
batch, trains on it, publishes the new policy version, evaluates and saves when due, and only then gives the batch's room
back. What each loop waits for is told in `ray_rl.buffer`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from ray_rl.buffer import Batch, StalenessBuffer
from ray_rl.config import RunConfig
from ray_rl.errors import RunError, first_error
from ray_rl.evaluation import evaluate
from ray_rl.health import warnings_of
from ray_rl.metrics import step_metrics
from ray_rl.progress import ProgressView
from ray_rl.prompt_stream import PromptStream
from ray_rl.protocols import CollectedGroup, Learner, RolloutPool
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.sinks import MetricSink
from ray_rl.types import Prompt

T = TypeVar("T")


class RunStopped(RunError):
    """The run cannot go on sensibly; the message says why and what to change."""


class Orchestrator:
    """Runs the loops on a pool and a learner that it knows by their protocols only."""

    def __init__(
        self,
        config: RunConfig,
        *,
        pool: RolloutPool,
        learner: Learner,
        stream: PromptStream,
        evaluation_prompts: Sequence[Prompt],
        folder: RunFolder,
        sink: MetricSink,
        record: Callable[[int, Sequence[CollectedGroup]], Awaitable[None]],
        progress: ProgressView,
        report: RunReport,
    ) -> None:
        """Hand in the parts; `run` sets them going.

        Args:
            config: the resolved configuration.
            pool: where groups are sampled.
            learner: what is trained.
            stream: where prompts come from.
            evaluation_prompts: held-out problems.
            folder: where checkpoints go.
            sink: where a step's metrics go.
            record: keeps samples of a step's groups.
            progress: what the user sees.
            report: filled while the run goes on.
        """
        self._config = config
        self._pool = pool
        self._learner = learner
        self._stream = stream
        self._evaluation_prompts = evaluation_prompts
        self._folder = folder
        self._sink = sink
        self._record = record
        self._progress = progress
        self._report = report
        self._buffer: StalenessBuffer  # made by `run`, which knows how many steps are left
        self._untrained: set[int] = set()
        self._redo: list[int] = []
        self._saved_step: int | None = None
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        """End after the training step in progress, if any, with a checkpoint."""
        self._stop.set()

    async def run(self, start: RunState) -> None:
        """From a state (step 0 for a new run) to the last step, or to a requested stop.

        Raises:
            RunStopped: too many gradings failed; what is trained by then is saved.
        """
        self._stream.restore(start.position)
        self._redo = list(start.pending_positions)
        self._saved_step = start.step if start.step else None
        step = start.step
        training = self._config.training
        left = (training.steps - step) * training.prompts_per_step
        self._buffer = StalenessBuffer(
            training.prompts_per_step,
            training.max_staleness,
            total=left,
            decided=training.decided_groups,
            refill_limit=training.refill_limit,
        )
        self._report.steps = step
        await self._publish(step)
        if self._config.evaluation.at_start and step == 0:
            self._report.evaluation_before = await self._evaluate(step)
            self._report.evaluation_after = {}
        collector = asyncio.create_task(self._collect_loop(), name="collect loop")
        try:
            while step < self._config.training.steps and not self._stop.is_set():
                if not await self._train_step(step + 1, collector):
                    break
                step += 1
                self._report.steps = step
                if self._due(self._config.checkpoint.every, step):
                    await self._checkpoint(step)
        except RunStopped:
            await self._save_if_new(step)
            raise
        finally:
            await _cancel(collector)
        await self._finish(step)

    async def _finish(self, step: int) -> None:
        self._report.interrupted = step < self._config.training.steps
        if self._config.evaluation.at_end and not self._report.interrupted:
            if not self._due(self._config.evaluation.every, step):
                self._report.evaluation_after = await self._evaluate(step)
            self._progress.phase("saving")
        await self._save_if_new(step)
        if not self._report.interrupted:
            await self._timed("saving", self._learner.export(self._folder.final))

    async def _train_step(self, step: int, collector: asyncio.Task[None]) -> bool:
        """One step; False when a stop was requested before it began."""
        started = time.monotonic()
        batch = await self._take(step - 1, collector)
        if batch is None:
            return False
        taken = time.monotonic()
        summaries = [group.summary for group in batch.groups]
        metrics = step_metrics(summaries, step - 1, filtered=batch.filtered, stale=batch.stale)
        self._check_failures(metrics)
        learned = await self._learn(step, batch.groups)
        trained = time.monotonic()
        metrics |= {
            **learned,
            **await self._publish(step),
            "timing/rollout": taken - started,
            "timing/train": trained - taken,
            "buffer/depth": float(self._buffer.depth),
            "groups/dropped": float(sum(self._buffer.dropped.values())),
            **{f"groups/dropped_{reason}": float(count) for reason, count in self._buffer.dropped.items()},
        }
        self._account(metrics, time.monotonic() - started)
        await self._record(step, batch.groups)
        self._show(step, metrics)
        if self._due(self._config.evaluation.every, step):
            metrics |= await self._evaluate(step, log=False)
        self._sink.log(step, metrics)
        self._untrained.difference_update(group.prompt.position for group in batch.groups)
        await self._buffer.release()
        return True

    async def _learn(self, step: int, groups: Sequence[CollectedGroup]) -> Mapping[str, float]:
        if not groups:
            # The step counts and its version is published all the same: a version is the number of steps done.
            self._progress.warn(f"every group of step {step} was decided and dropped: the policy stays as it is")
            return {}
        return (await self._learner.train(step, groups)).metrics

    def _account(self, metrics: dict[str, float], seconds: float) -> None:
        """Add what follows from a step's metrics and duration to the metrics and to the report."""
        tokens = metrics["tokens/primary"] + metrics["tokens/continuations"]
        metrics |= {"timing/step": seconds, "perf/tokens_per_second": tokens / seconds}
        self._report.spend("rollout", metrics["timing/rollout"])
        self._report.spend("train", metrics["timing/train"])
        self._report.primary_tokens += int(metrics["tokens/primary"])
        self._report.continuation_tokens += int(metrics["tokens/continuations"])
        self._report.dropped_groups = dict(self._buffer.dropped)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        self._progress.step(step, metrics)
        for warning in warnings_of(metrics):
            self._progress.warn(warning)

    async def _take(self, version: int, collector: asyncio.Task[None]) -> Batch | None:
        """The next batch; None when a stop was requested; the collect loop's error when it failed."""
        take = asyncio.create_task(self._buffer.take(version))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({take, stop, collector}, return_when=asyncio.FIRST_COMPLETED)
            if collector.done():
                await self._save_if_new(version)  # nothing is wrong with the learner
                raise first_error(collector.exception() or RunStopped("the collect loop ended by itself"))
            return take.result() if take.done() and not self._stop.is_set() else None
        finally:
            await _cancel(take)
            await _cancel(stop)

    async def _collect_loop(self) -> None:
        """Keep groups in flight; the first failure ends the loop and, through `_take`, the run."""
        async with asyncio.TaskGroup() as groups:
            places = asyncio.Semaphore(self._pool.capacity)
            while True:
                await self._buffer.admit()
                await places.acquire()
                prompt = self._stream.at(self._redo.pop(0)) if self._redo else self._stream.next()
                self._untrained.add(prompt.position)
                task = groups.create_task(self._collect_one(prompt))
                task.add_done_callback(lambda _: places.release())

    async def _collect_one(self, prompt: Prompt) -> None:
        await self._buffer.put(await self._pool.collect(prompt))

    async def _publish(self, version: int) -> dict[str, float]:
        started = time.monotonic()
        weights = await self._timed("weight sync", self._learner.publish(version))
        metrics = await self._timed("weight sync", self._pool.publish(weights))
        return {**metrics, "timing/weight_sync": time.monotonic() - started}

    async def _evaluate(self, step: int, *, log: bool = True) -> dict[str, float]:
        self._progress.phase(f"evaluating on {len(self._evaluation_prompts)} held-out problems")
        metrics = await self._timed(
            "evaluation", evaluate(self._pool, self._evaluation_prompts, self._config.evaluation)
        )
        self._report.evaluation_after = metrics
        self._progress.evaluation(step, metrics)
        if log:
            self._sink.log(step, metrics)
        self._progress.phase("training")
        return metrics

    async def _save_if_new(self, step: int) -> None:
        if step and self._saved_step != step:
            await self._checkpoint(step)

    async def _checkpoint(self, step: int) -> None:
        state = RunState(
            step=step,
            policy_version=step,
            position=self._stream.position,
            pending_positions=tuple(sorted({*self._untrained, *self._redo} - self._buffer.dropped_positions)),
            seed=self._config.seed,
        )
        with self._folder.new_checkpoint(state) as folder:
            await self._timed("saving", self._learner.save(folder / "learner"))
            await self._timed("saving", self._learner.export(folder / "policy"))
        self._folder.prune(self._config.checkpoint.keep)
        self._saved_step = step

    def _check_failures(self, metrics: dict[str, float]) -> None:
        share, limit = metrics["reward/failures"], self._config.reward.max_failure_share
        if share > limit:
            raise RunStopped(
                f"reward.max_failure_share: {share:.0%} of this step's gradings failed (limit {limit:.0%}); the reward "
                "actors' log shows the offending texts. Mend the grader, or raise reward.timeout or the limit"
            )

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0

    async def _timed(self, phase: str, work: Awaitable[T]) -> T:
        started = time.monotonic()
        try:
            return await work
        finally:
            self._report.spend(phase, time.monotonic() - started)


async def _cancel(task: asyncio.Task[T]) -> None:
    """Cancel and wait, so that nothing of it runs on."""
    task.cancel()
    await asyncio.wait({task})
