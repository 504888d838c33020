"""The composition root: makes the actors and the learner of a configuration and runs them.

The only module that imports actors and learner. Everything it starts, it ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.pool import ActorPool, PoolLimits
from actors.pool_member import in_a_line
from actors.reward_actor import create_reward_actors, end_reward_actors, start_reward_actors
from actors.rewards import check_python_function
from actors.rollout_client import create_rollout_client
from learner.advantages import token_advantages
from learner.group import LearnerGroup
from ray_rl.config import RunConfig
from ray_rl.config.reward import PythonRewardConfig
from ray_rl.control import ControlServer, scale_pool
from ray_rl.deadlines import DeadlineExceeded, in_daemon, result, wait
from ray_rl.embedded import policy_path
from ray_rl.errors import writing
from ray_rl.evaluation import evaluate
from ray_rl.journal import Journal
from ray_rl.ledger import Ledger
from ray_rl.memory import MemoryWatch
from ray_rl.model_files import check_model_folder
from ray_rl.object_store import ObjectStore
from ray_rl.orchestrator import Orchestrator
from ray_rl.placement import Demand, is_own_ray, rank_homes, unplaced_rollout_actors, wait_for_place
from ray_rl.progress import ConsoleProgress
from ray_rl.prompt_stream import PromptStream, encode_problem
from ray_rl.protocols import CollectedGroup
from ray_rl.ray_gauges import RayGauges, discoverable
from ray_rl.ray_session import cluster_nodes, placement_seconds, ray_session, run_to_end
from ray_rl.recorder import GroupRecorder
from ray_rl.run_logs import driver_log
from ray_rl.run_report import REPORT_FILE, RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.sinks import ManySinks, logged_metrics, make_sink
from ray_rl.startup import Startup
from ray_rl.tasks import make_task
from ray_rl.tokenizer import TokenizerCodec, load_tokenizer
from ray_rl.trackers import Trackers
from ray_rl.watchdog import Watchdog
from ray_rl.weight_file import sweep

_READING_SECONDS = 24 * 3600.0


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
        with _prepared_in_ray(config, startup, evaluates=evaluates) as prepared:
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
        with _prepared_in_ray(config, Startup()) as prepared:
            return run_to_end(_evaluate(config, prepared, progress))


class Prepared:
    """What a run needs besides actors: the tokenizer, the prompts to train on, the prompts to evaluate on."""

    def __init__(self, config: RunConfig, *, evaluates: bool = True) -> None:
        """Read model and data; held-out problems only for a run that evaluates.

        Raises:
            ConfigError: one of them is not what the configuration says.
        """
        model, source = config.model, model_source(config)
        check_model_folder(source)
        task = make_task(config.task)
        self.codec = load_tokenizer(source, trust_remote_code=model.trust_remote_code, revision=model.revision)
        self.codec.check_ends(config.rollout.stop_token_ids)
        encode = partial(
            encode_problem,
            self.codec,
            system_prompt=model.system_prompt,
            use_chat_template=model.chat_template,
            max_tokens=model.max_model_len - config.rollout.max_tokens,
        )
        self.stream = PromptStream(task.problems("train"), encode, seed=config.seed, shuffle=config.training.shuffle)
        self.stream.check()
        held_out = task.problems("eval") if evaluates else ()
        count = min(len(held_out), config.evaluation.problems)
        self.evaluation_prompts = [encode(held_out[index], position=-1) for index in range(count)]


@contextmanager
def _prepared_in_ray(config: RunConfig, startup: Startup, *, evaluates: bool = True) -> Iterator[Prepared]:
    """Read model and data while Ray, which mostly waits, comes up. Raises as `Prepared` and `ray_session` do."""

    def read() -> Prepared:
        prepared = Prepared(config, evaluates=evaluates)
        startup.reached("prepared")
        return prepared

    if isinstance(config.reward, PythonRewardConfig):  # in this thread: the user's module may want the main one
        check_python_function(config.reward.function)
    what = "model and data to be read"
    reading = in_daemon(read, what)
    with ray_session(config):  # in this thread, with whose end the system would kill Ray's processes
        startup.reached("ray")
        yield result(reading, _READING_SECONDS, what=what, causes="a large download")


def model_source(config: RunConfig) -> str:
    """What transformers and vLLM load: a folder, or a Hugging Face name."""
    if config.model.path == "embedded":
        return str(policy_path())
    local = Path(config.model.path).expanduser()
    return str(local.resolve()) if local.is_dir() else config.model.path


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
    async with _actors(config, run_id, startup, warn=progress.warn, step=start.step, logs=folder.logs) as actors:
        learner = actors.learner
        assert learner is not None
        if isinstance(checkpoint := folder.checkpoint(start.step), ObjectStore):
            await learner.reach(checkpoint.parent)
        if start.step:
            await learner.load(checkpoint / "learner")
            report.evaluation_before = logged_metrics(folder.path / "metrics.jsonl", 0)
        gauges = RayGauges(config.name, folder.path.name, exports=config.logging.ray_metrics)
        files = make_sink(folder.path, config.logging, resume_step=start.step)
        sink = ManySinks([files, gauges, Trackers(config, folder.path, progress.warn)])
        recorder = _Recorder(config, folder, prepared.codec, start.step, progress.warn)
        watchdog = Watchdog(folder.path, config.logging.watchdog_seconds, collect=actors.stacks, warn=progress.warn)
        ledger = Ledger(folder.ledger, start)
        if ledger.note:
            progress.warn(ledger.note)

        def without_place(size: int) -> int:
            return unplaced_rollout_actors(config, cluster_nodes(), size)

        orchestrator = Orchestrator(
            config,
            pool=actors.pool,
            learner=learner,
            stream=prepared.stream,
            evaluation_prompts=prepared.evaluation_prompts,
            folder=folder,
            ledger=ledger,
            journal=Journal(config, sink=sink, recorder=recorder, progress=progress, report=report, startup=startup),
            moved=watchdog.moved,
            without_place=without_place,
        )

        def scale(size: int) -> str:
            line = scale_pool(actors.pool, size, without_place)
            orchestrator.keep_size()
            progress.note(f"ray-rl scale: {line}")
            return line

        control = ControlServer(folder.path, run_id, status=orchestrator.status, scale=scale, warn=progress.warn)
        finds_itself = config.logging.ray_metrics and is_own_ray(config)
        found = discoverable(folder.path, progress.note) if finds_itself else nullcontext()
        with _signals(orchestrator, progress), found:
            try:
                async with control, watchdog, gauges.shown(orchestrator.status):
                    await orchestrator.run(start)
            finally:
                sink.close()


async def _evaluate(config: RunConfig, prepared: Prepared, progress: ConsoleProgress) -> dict[str, float]:
    progress.phase("starting engines")
    async with _actors(config, uuid.uuid4().hex[:12], Startup(), warn=progress.warn, with_learner=False) as actors:
        progress.phase(f"evaluating on {len(prepared.evaluation_prompts)} held-out problems")
        return await evaluate(actors.pool, prepared.evaluation_prompts, config.evaluation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Actors:
    """All actors of a run."""

    pool: ActorPool
    learner: LearnerGroup | None
    """None where nothing is trained."""

    async def stacks(self) -> dict[str, str]:
        """What each process of pool and learner is doing."""
        return {**await self.pool.stacks(), **(await self.learner.stacks() if self.learner else {})}


@asynccontextmanager
async def _actors(
    config: RunConfig,
    run_id: str,
    startup: Startup,
    *,
    warn: Callable[[str], None],
    with_learner: bool = True,
    step: int = 0,
    logs: Path | None = None,
) -> AsyncIterator[_Actors]:
    """All actors of a run, started side by side; ended together, whatever happens."""
    model, rollout = model_source(config), config.rollout
    learner = _learner(config, model, run_id, logs) if with_learner else None
    reward_actors: list[Any] = []
    pool = ActorPool(
        lambda index: create_rollout_client(
            config, model, run_id, index, reward_actors=reward_actors, step=step, logs=logs
        ),
        rollout.least_actors,
        limits=PoolLimits(
            groups_in_flight=rollout.most_groups,
            start_timeout=rollout.start_timeout,
            group_timeout=rollout.group_timeout,
            publish_timeout=config.weights.timeout,
            outage_timeout=rollout.outage_timeout,
            max_attempts=rollout.max_attempts,
        ),
        serves_loaded=not with_learner,
        warn=warn,
    )
    try:
        demand = Demand.of(config, with_learner=with_learner)
        # Beside the requests for the actors: it is those that an autoscaler answers.
        async with asyncio.TaskGroup() as starting:
            starting.create_task(wait_for_place(demand, cluster_nodes, placement_seconds(config)))
            if learner:
                await learner.reserve()  # before other actors take the ranks' places
                starting.create_task(startup.reached_by(learner.begin(), "learner"))
            reward_actors.extend(create_reward_actors(config, logs))
            starting.create_task(startup.reached_by(pool.start(), "engines"))
            graders = start_reward_actors(reward_actors, rollout.start_timeout)
            starting.create_task(startup.reached_by(graders, "reward_actors"))
        yield _Actors(pool=pool, learner=learner)
    finally:
        try:
            # The learner first: on each node the last user of the run's files removes them, and it is killed without ado.
            if learner:
                learner.shutdown()
        finally:
            try:
                await pool.shutdown()
            finally:  # also when the user would not wait for the engines
                await end_reward_actors(reward_actors)
                sweep(run_id)


def _learner(config: RunConfig, model: str, run_id: str, logs: Path | None) -> LearnerGroup:
    def homes() -> Sequence[str]:
        return rank_homes(config, cluster_nodes())

    return LearnerGroup(config, model, run_id, may_grow=not is_own_ray(config), logs=logs, homes=homes)


class _Recorder:
    """A `GroupRecorder` that fetches the few groups it wants, with the advantages that the learner gave them."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, codec: TokenizerCodec, step: int, warn: Callable[[str], None]
    ) -> None:
        self._config = config
        self._warn = warn
        path = folder.path / "groups.jsonl"
        self._recorder = GroupRecorder(path, config.logging.groups_per_step, codec, resume_step=step)

    async def record(self, step: int, groups: Sequence[CollectedGroup]) -> None:
        """Of the groups that are still there."""
        for index in self._recorder.choose([collected.summary for collected in groups]):
            try:
                group = await wait(groups[index].ref, self._config.learner.step_timeout, what="a group to record")
            except (RayError, DeadlineExceeded) as error:
                self._warn(f"a group of step {step} is not recorded, since it is gone: {in_a_line(error)}")
            else:
                self._recorder.write(step, group, token_advantages(group, self._config.advantage))

    def rewind(self, step: int) -> None:
        """As `GroupRecorder.rewind`."""
        self._recorder.rewind(step)


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
