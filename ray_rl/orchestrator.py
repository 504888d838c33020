"""The train loop of a run, and what happens around it.

      prompts -> Collector -> StalenessBuffer -> train loop -> learner.train
                    ^                                              |
                    +---- pool (new weights) <- learner.publish <--+

The collector keeps as many groups in flight as the buffer admits. The train loop takes a batch, trains on it, publishes the
new policy version, evaluates and saves when due, and only then gives the batch's room back. What each loop waits for is
told in `ray_rl.buffer`.

What dies: rollout actors are the pool's business. A learner that died comes back at its last checkpoint
(`ray_rl.learner_keeper`), and the steps after that are undone and done again, on groups that the buffer still has and on
prompts that are sampled again. The ledger says where each prompt ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray_rl.autoscaling import Autoscaler
from ray_rl.buffer import Batch, StalenessBuffer
from ray_rl.collector import Collector, RunStopped
from ray_rl.config import RunConfig
from ray_rl.config.rollout import ActorRange
from ray_rl.deadlines import end, first_of, in_thread
from ray_rl.errors import NotWritten, RunError, first_error
from ray_rl.evaluation import evaluate
from ray_rl.journal import Journal
from ray_rl.learner_keeper import LearnerKeeper
from ray_rl.ledger import Ledger
from ray_rl.mailbox import RunStatus
from ray_rl.metrics import step_metrics
from ray_rl.placement import no_place
from ray_rl.prompt_stream import PromptStream
from ray_rl.protocols import GroupsLost, Learner, LearnerDied, RolloutPool
from ray_rl.run_state import RunFolder, RunState
from ray_rl.types import Prompt

_SHOWN = ("reward/mean", "reward/accuracy", "perf/tokens_per_second", "timing/step", "staleness/mean")
"""Metrics of the last step that `ray-rl status` shows."""
_END_SECONDS = 60.0
_PATIENCE = 20
"""Steps in which an actor that the autoscaler asked for must begin to serve."""
_LOOK_SECONDS = 1.0
"""Between looks whether an engine that joined waits for weights, while the learner waits for groups."""


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
        ledger: Ledger,
        journal: Journal,
        moved: Callable[[str], None] = lambda what: None,
        without_place: Callable[[int], int] = lambda size: 0,
    ) -> None:
        """Hand in the parts; `run` sets them going.

        Args:
            config: the resolved configuration.
            pool: where groups are sampled.
            learner: what is trained.
            stream: where prompts come from.
            evaluation_prompts: held-out problems.
            folder: where checkpoints go.
            ledger: opened at the state that the run starts from.
            journal: told of everything that somebody may want to read.
            moved: told of everything that shows that the run is alive.
            without_place: says for how many of so many rollout actors the cluster has no place at present.
        """
        self._config = config
        self._pool = pool
        self._learner = learner
        self._stream = stream
        self._evaluation_prompts = evaluation_prompts
        self._folder = folder
        self._ledger = ledger
        self._journal = journal
        self._moved = moved
        self._without_place = without_place
        actors = config.rollout.num_actors
        takes_turns = config.training.max_staleness == 0
        self._autoscaler = Autoscaler(actors, takes_turns=takes_turns) if isinstance(actors, ActorRange) else None
        self._keeper = LearnerKeeper(
            learner,
            folder,
            keep=config.checkpoint.keep,
            max_restarts=config.learner.max_restarts,
            timeout=config.learner.step_timeout,
            warn=journal.warn,
        )
        self._unsettled = 0
        """Steps in a row in which not all actors that are wanted served."""
        self._step = 0
        """Training steps done; the learner has the policy after the last of them."""
        self._learner_fits = True
        """Whether the learner's state is that after `_step`; amid a step, or a restart, nobody knows what it is."""
        self._batch: Batch | None = None
        """Taken, and neither trained on nor given back."""
        self._holds_room = False
        """Whether the batch taken last still has its room in the buffer."""
        self._buffer: StalenessBuffer  # made by `run`, which knows how many steps are left
        self._collector: Collector
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        """End after the training step in progress, if any, with a checkpoint."""
        self._stop.set()

    def keep_size(self) -> None:
        """Somebody has chosen the number of rollout actors: the run changes it no more by itself."""
        self._autoscaler = None

    def status(self) -> RunStatus:
        """What the run is doing."""
        return RunStatus(
            name=self._config.name,
            step=self._step,
            steps=self._config.training.steps,
            phase=self._journal.phase,
            seconds_since_step=self._journal.seconds_since_step,
            policy_version=self._step,
            buffer_depth=self._buffer.depth if hasattr(self, "_buffer") else 0,
            actors_wanted=self._pool.size,
            actors=tuple(self._pool.status()),
            actors_died=self._pool.died,
            learner_restarts=self._keeper.restarts,
            ledger={name: int(count) for name, count in self._ledger.totals().items()},
            metrics={name: value for name, value in self._journal.last.items() if name in _SHOWN},
        )

    async def run(self, start: RunState) -> None:
        """From a state (step 0 for a new run), which the learner has, to the last step, or to a requested stop.

        Raises:
            RunStopped: too many gradings failed, or something dies again and again; what is trained by then is saved.
            NoActorsLeft: no rollout actor came back; what is trained is saved.
            NotWritten: the last checkpoint, or the record of a step, found no room.
        """
        self._begin(start)
        await self._publish_in_any_case()
        if self._config.evaluation.at_start and not self._step:
            self._journal.report.evaluation_before = await self._evaluate_in_any_case()
            self._journal.report.evaluation_after = {}
        self._journal.begin("training")
        collecting = asyncio.create_task(self._collector.run(), name="collect loop")
        try:
            await self._train(collecting)
        except Exception:
            await self._save_what_there_is()
            raise
        finally:
            await end(collecting, _END_SECONDS, what="the collect loop")
        await self._finish()

    def _begin(self, start: RunState) -> None:
        training = self._config.training
        self._step = self._journal.report.steps = start.step
        self._keeper.saved_step = start.step or None
        self._stream.restore(start.position)
        self._buffer = StalenessBuffer(
            training.prompts_per_step,
            training.max_staleness,
            total=(training.steps - start.step) * training.prompts_per_step,
            decided=training.decided_groups,
            refill_limit=training.refill_limit,
            on_drop=self._ledger.drop,
        )
        self._collector = Collector(
            self._pool,
            self._buffer,
            self._stream,
            self._ledger,
            warn=self._journal.warn,
            moved=self._moved,
            startup=self._journal.startup,
        )
        self._collector.sample_again(start.pending_positions)

    async def _train(self, collecting: asyncio.Task[None]) -> None:
        """All steps, and the checkpoint after the last one."""
        while True:
            try:
                while self._step < self._config.training.steps and await self._train_step(collecting):
                    if self._due(self._config.checkpoint.every):
                        await self._save_if_there_is_room()
                await self._save_if_new()
                return
            except LearnerDied as death:
                await self._revive(death)

    async def _train_step(self, collecting: asyncio.Task[None]) -> bool:
        """One step; False when a stop was requested before it began."""
        started = time.monotonic()
        while (batch := await self._take(collecting)) is not None:
            taken = time.monotonic()
            metrics = self._sampled(batch)
            learned = await self._learn(self._step + 1, batch)
            if learned is not None:
                metrics |= {**learned, "timing/rollout": taken - started, "timing/train": time.monotonic() - taken}
                await self._complete(batch, metrics, started)
                return True
        return False

    async def _complete(self, batch: Batch, metrics: dict[str, float], started: float) -> None:
        """What follows when a batch was trained on: the book, the new version, the journal, the room for other groups."""
        self._batch = None
        self._step += 1
        self._learner_fits = True
        self._ledger.train(self._step, [group.prompt.position for group in batch.groups])
        self._journal.learned(self._step, metrics)
        metrics |= {**await self._publish(), "timing/step": time.monotonic() - started, **self._counts()}
        await self._journal.step(self._step, metrics, batch.groups)
        self._moved(f"training step {self._step}")
        self._autoscale(metrics)
        if self._due(self._config.evaluation.every):
            await self._evaluate()
        await self._release()

    def _sampled(self, batch: Batch) -> dict[str, float]:
        """Metrics of what was sampled for a step.

        Raises:
            RunStopped: too many gradings failed.
        """
        summaries = [group.summary for group in batch.groups]
        metrics = step_metrics(summaries, self._step, filtered=batch.filtered, stale=batch.stale)
        share, limit = metrics["reward/failures"], self._config.reward.max_failure_share
        if share > limit:
            raise RunStopped(
                f"reward.max_failure_share: {share:.0%} of this step's gradings failed (limit {limit:.0%}); the reward "
                "actors' log shows why. Mend the grader; where it is only slow, raise reward.timeout, reward.processes or "
                "reward_actors.actors; or raise the limit"
            )
        return metrics

    async def _learn(self, step: int, batch: Batch) -> Mapping[str, float] | None:
        """Train on a batch; None, and the rest is given back, where some of its groups are gone."""
        if not batch.groups:
            # The step counts and its version is published all the same: a version is the number of steps done.
            self._journal.warn(f"every group of step {step} was decided and dropped: the policy stays as it is")
            return {}
        self._learner_fits = False
        try:
            return (await self._learner.train(step, batch.groups)).metrics
        except GroupsLost as loss:
            self._learner_fits = True  # nothing was trained
            self._journal.warn(f"{loss}; their prompts are sampled again")
            await self._give_back(batch, loss.positions)
            self._collector.sample_again(loss.positions)
            return None

    async def _give_back(self, batch: Batch, lost: Sequence[int] = ()) -> None:
        self._batch, self._holds_room = None, False
        await self._buffer.give_back(batch, lost)

    async def _release(self) -> None:
        self._holds_room = False
        await self._buffer.release()

    def _counts(self) -> dict[str, float]:
        dropped = self._buffer.dropped
        self._journal.report.dropped_groups = dict(dropped)
        return {
            "buffer/depth": float(self._buffer.depth),
            "groups/dropped": float(sum(dropped.values())),
            **{f"groups/dropped_{reason}": float(count) for reason, count in dropped.items()},
            **self._ledger.totals(),
            "learner/restarts": float(self._keeper.restarts),
        }

    def _autoscale(self, metrics: Mapping[str, float]) -> None:
        if self._autoscaler is None:
            return
        before, serving = self._pool.size, [actor.state for actor in self._pool.status()].count("serving")
        self._unsettled = 0 if serving == before else self._unsettled + 1
        if not self._unsettled:
            size = self._autoscaler.decide(metrics, before)
        elif self._unsettled >= _PATIENCE and before > self._config.rollout.least_actors:
            size, self._unsettled = before - 1, 0  # it finds no place
        else:
            size = before
        if size != before:
            waiting = self._without_place(size) if size > before else 0
            line = f"rollout.num_actors: from {before} to {size} actors"
            self._journal.note(f"{line}; {no_place(waiting, size)}" if waiting else line)
            self._pool.resize(size)

    async def _take(self, collecting: asyncio.Task[None]) -> Batch | None:
        """The next batch; None when a stop was requested; the collect loop's error when it failed."""
        take = asyncio.create_task(self._buffer.take(self._step))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await self._until_one_is_done(take, stop, collecting)
            if collecting.done():
                raise first_error(collecting.exception() or RunStopped("the collect loop ended by itself"))
            return take.result() if take.done() and not self._stop.is_set() else None
        finally:
            await end(take, _END_SECONDS, what="the wait for a batch")
            await end(stop, _END_SECONDS, what="the wait for a stop")
            if take.done() and not take.cancelled() and take.exception() is None:
                # Also when something else failed meanwhile: its groups are not to be lost.
                self._batch, self._holds_room = take.result(), True

    async def _until_one_is_done(self, *tasks: asyncio.Task[Any]) -> None:
        """An engine that joins where the present weights do not lie gets them meanwhile, by another publication."""
        while not await first_of(tasks, _LOOK_SECONDS):
            if self._pool.waits_for_weights:
                await self._publish()

    async def _publish(self) -> dict[str, float]:
        """Bring the learner's policy to the engines."""
        started = time.monotonic()
        self._buffer.expect(self._step)
        publication = self._pool.publish(partial(self._learner.publish, self._step))
        metrics = await self._journal.timed("weight sync", publication)
        self._moved(f"the publication of version {self._step}")
        return {**metrics, "timing/weight_sync": time.monotonic() - started}

    async def _publish_in_any_case(self) -> None:
        try:
            await self._publish()
        except LearnerDied as death:
            await self._revive(death)

    async def _revive(self, death: LearnerDied) -> None:
        """Bring the learner back at its last checkpoint, and the rest of the run to the same step."""
        self._learner_fits = False
        if self._batch is not None:
            await self._give_back(self._batch)
        step = await self._journal.timed("restarting the learner", self._keeper.revive(death))
        again = [*self._ledger.undo(step), *await self._buffer.undo(step, self._step - step)]
        self._collector.sample_again(again)
        if self._holds_room:  # now that the collector knows what comes first
            await self._release()
        self._journal.rewind(step)
        self._step = step
        self._learner_fits = True
        self._moved("a restart of the learner")
        await self._publish_in_any_case()
        self._buffer.forget(self._step)  # what was begun since then may have begun with what the engines had before

    async def _finish(self) -> None:
        """After the last checkpoint: evaluate, and leave the trained policy where users look for it."""
        self._journal.report.interrupted = self._step < self._config.training.steps
        if self._journal.report.interrupted:
            return
        if self._config.evaluation.at_end and not self._due(self._config.evaluation.every):
            await self._evaluate_in_any_case()
        self._journal.begin("saving")
        finish = partial(self._folder.finish, self._step)
        await in_thread(finish, self._config.learner.step_timeout, what="the trained policy to lie in final/")

    async def _evaluate(self) -> Mapping[str, float]:
        self._journal.begin(f"evaluating on {len(self._evaluation_prompts)} held-out problems")
        work = evaluate(self._pool, self._evaluation_prompts, self._config.evaluation, moved=self._moved)
        evaluation = asyncio.create_task(work, name="evaluation")
        try:
            await self._journal.timed("evaluation", self._until_one_is_done(evaluation))
        finally:
            await end(evaluation, _END_SECONDS, what="the evaluation")
        metrics = evaluation.result()
        self._journal.evaluation(self._step, metrics)
        self._journal.begin("training")
        return metrics

    async def _evaluate_in_any_case(self) -> Mapping[str, float]:
        """Where the newest checkpoint, or the initial policy, is what is evaluated: a learner that dies comes back at that."""
        while True:
            try:
                return await self._evaluate()
            except LearnerDied as death:
                await self._revive(death)

    async def _save_if_new(self) -> None:
        if self._step and self._keeper.saved_step != self._step:
            state = self._ledger.state(self._step, self._stream.position, self._config.seed)
            await self._journal.timed("saving", self._keeper.save(state))
            self._moved(f"the checkpoint of step {self._step}")

    async def _save_if_there_is_room(self) -> None:
        try:
            await self._save_if_new()
        except NotWritten as fault:
            self._journal.warn(f"no checkpoint after step {self._step}, and the run goes on without: {fault}")

    async def _save_what_there_is(self) -> None:
        """Before an error ends the run, which matters more than one that keeps it from being saved."""
        lost = "what was trained since the last checkpoint is lost"
        if not self._learner_fits:
            self._journal.warn(f"{lost}: the learner was amid a step, or a restart")
            return
        try:
            await self._save_if_new()
        except RunError as fault:
            self._journal.warn(f"{lost}: {fault}")

    def _due(self, every: int) -> bool:
        return bool(every) and self._step % every == 0
