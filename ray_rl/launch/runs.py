"""A training and an evaluation, from the configuration to the end."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

from learner.group import LearnerGroup
from ray_rl.config import RunConfig
from ray_rl.control import ControlServer, scale_pool
from ray_rl.errors import writing
from ray_rl.evaluation import evaluate
from ray_rl.journal import Journal
from ray_rl.launch.actors import running_actors
from ray_rl.launch.prepared import Prepared, prepared_in_ray
from ray_rl.launch.recording import Recorder
from ray_rl.ledger import Ledger
from ray_rl.memory import MemoryWatch
from ray_rl.object_store import ObjectStore
from ray_rl.orchestrator import Orchestrator
from ray_rl.placement import is_own_ray, unplaced_rollout_actors
from ray_rl.progress import ConsoleProgress
from ray_rl.ray_gauges import RayGauges, discoverable
from ray_rl.ray_session import cluster_nodes, run_to_end
from ray_rl.run_logs import driver_log
from ray_rl.run_report import REPORT_FILE, RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.sinks import ManySinks, logged_metrics, make_sink
from ray_rl.startup import Startup
from ray_rl.trackers import Trackers
from ray_rl.watchdog import Watchdog


def train(config: RunConfig, folder: RunFolder, start: RunState) -> RunReport:
    """Train from a state to the end, in a Ray of the run's own or in the cluster of `ray.address`.

    Raises:
        ConfigError: what only the real data, model or grader could show.
        PlacementError: the cluster lacks resources.
        RunStopped: the run cannot go on sensibly.
    """
    startup = Startup()
    report = RunReport(name=config.name, folder=folder.where, startup=startup.metrics)
    with (
        driver_log(folder.logs) as log,
        MemoryWatch() as memory,
        ConsoleProgress(config.training.steps, start.step, also=log) as progress,
    ):
        progress.phase("reading model and data")
        evaluation = config.evaluation
        evaluates = bool(evaluation.at_start or evaluation.at_end or evaluation.every)
        with prepared_in_ray(config, startup, evaluates=evaluates) as prepared:
            folder.write_config(config)  # a resumed run's may have changed
            run_to_end(_train(config, folder, start, prepared, progress, report, startup))
        report.peak_bytes = memory.peak_bytes
    report.next_steps = _next_steps(report)
    with writing(folder.path / REPORT_FILE):
        (folder.path / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
    progress.report(report)
    return report


def evaluate_policy(config: RunConfig) -> dict[str, float]:
    """Accuracy of `model.path` on the task's held-out problems, without a learner.

    Raises:
        ConfigError: as `train`.
        PlacementError: as `train`.
    """
    with ConsoleProgress(config.training.steps) as progress:
        progress.phase("reading model and data")
        with prepared_in_ray(config, Startup()) as prepared:
            return run_to_end(_evaluate(config, prepared, progress))


async def _train(
    config: RunConfig,
    folder: RunFolder,
    start: RunState,
    prepared: Prepared,
    progress: ConsoleProgress,
    report: RunReport,
    startup: Startup,
) -> None:
    progress.phase("starting engines and learner")
    run_id = uuid.uuid4().hex[:12]
    async with running_actors(config, run_id, startup, warn=progress.warn, step=start.step, logs=folder.logs) as actors:
        learner = actors.learner
        assert learner is not None
        await _load(learner, folder, start.step)
        if start.step:
            report.evaluation_before = logged_metrics(folder.path / "metrics.jsonl", 0)
        gauges = RayGauges(config.name, folder.path.name, exports=config.logging.ray_metrics)
        files = make_sink(folder.path, config.logging, resume_step=start.step)
        with closing(ManySinks([files, gauges, Trackers(config, folder.path, progress.warn)])) as sink:
            recorder = Recorder(config, folder, prepared.codec, start.step, progress.warn)
            watchdog = Watchdog(folder.path, config.logging.watchdog_seconds, collect=actors.stacks, warn=progress.warn)
            without_place = partial(_without_place, config)
            orchestrator = Orchestrator(
                config,
                pool=actors.pool,
                learner=learner,
                stream=prepared.stream,
                evaluation_prompts=prepared.evaluation_prompts,
                folder=folder,
                ledger=_ledger(folder, start, progress),
                journal=Journal(
                    config, sink=sink, recorder=recorder, progress=progress, report=report, startup=startup
                ),
                moved=watchdog.moved,
                without_place=without_place,
            )

            def scale(size: int) -> str:
                line = scale_pool(actors.pool, size, without_place)
                orchestrator.keep_size()
                progress.note(f"ray-rl scale: {line}")
                return line

            control = ControlServer(folder.path, run_id, status=orchestrator.status, scale=scale, warn=progress.warn)
            with _signals(orchestrator, progress), _told_where(config, folder, progress):
                async with control, watchdog, gauges.shown(orchestrator.status):
                    await orchestrator.run(start)


async def _load(learner: LearnerGroup, folder: RunFolder, step: int) -> None:
    checkpoint = folder.checkpoint(step)
    if isinstance(checkpoint, ObjectStore):
        await learner.reach(checkpoint.parent)
    if step:
        await learner.load(checkpoint / "learner")


def _ledger(folder: RunFolder, start: RunState, progress: ConsoleProgress) -> Ledger:
    ledger = Ledger(folder.ledger, start)
    if ledger.note:
        progress.warn(ledger.note)
    return ledger


def _without_place(config: RunConfig, size: int) -> int:
    return unplaced_rollout_actors(config, cluster_nodes(), size)


def _told_where(config: RunConfig, folder: RunFolder, progress: ConsoleProgress) -> AbstractContextManager[None]:
    """A Ray of the run's own is told to Prometheus by the run; another one tells of itself."""
    if config.logging.ray_metrics and is_own_ray(config):
        return discoverable(folder.path, progress.note)
    return nullcontext()


async def _evaluate(config: RunConfig, prepared: Prepared, progress: ConsoleProgress) -> dict[str, float]:
    progress.phase("starting engines")
    async with running_actors(
        config, uuid.uuid4().hex[:12], Startup(), warn=progress.warn, with_learner=False
    ) as actors:
        progress.phase(f"evaluating on {len(prepared.evaluation_prompts)} held-out problems")
        return await evaluate(actors.pool, prepared.evaluation_prompts, config.evaluation)


@contextmanager
def _signals(orchestrator: Orchestrator, progress: ConsoleProgress) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; the second at once."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked and main is not None:
            main.cancel()
            return
        asked = True
        progress.warn("stopping after the step in progress and saving; once more to stop at once")
        orchestrator.request_stop()

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop)
    try:
        yield
    finally:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signal_number)


def _next_steps(report: RunReport) -> list[str]:
    folder = report.folder
    if report.interrupted:
        return [f"go on with:     ray-rl train --resume {folder}"]
    return [
        f"look at it:     tensorboard --logdir {folder}   (and {folder}/groups.jsonl: segments, values, advantages)",
        f"use the policy: ray-rl export {folder} DIR",
        f"compare with:   ray-rl train {'laptop-vineppo' if report.name == 'laptop-grpo' else 'laptop-grpo'}",
        "a real model:   ray-rl train gsm8k-vineppo model.path=... (see the README)",
    ]
