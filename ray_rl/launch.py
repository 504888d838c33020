"""The composition root: makes the actors and the learner of a configuration and runs them.

The only module that imports actors and learner. Everything it starts, it ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ray

from actors.pool import ActorPool
from actors.reward_actor import create_reward_actors, start_reward_actors
from actors.rollout_actor import create_rollout_client
from learner.advantages import token_advantages
from learner.group import LearnerGroup
from ray_rl.config import RunConfig
from ray_rl.deadlines import wait
from ray_rl.embedded import policy_path
from ray_rl.errors import ConfigError
from ray_rl.evaluation import evaluate
from ray_rl.memory import MemoryWatch
from ray_rl.orchestrator import Orchestrator
from ray_rl.placement import required_resources, wait_for_resources
from ray_rl.progress import ConsoleProgress
from ray_rl.prompt_stream import PromptStream, encode_problem
from ray_rl.protocols import CollectedGroup
from ray_rl.ray_session import placement_seconds, ray_session, run_to_end
from ray_rl.recorder import GroupRecorder
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.sinks import logged_metrics, make_sink
from ray_rl.tasks import make_task
from ray_rl.tokenizer import TokenizerCodec, load_tokenizer
from ray_rl.weight_file import sweep

logger = logging.getLogger(__name__)


def train(config: RunConfig, folder: RunFolder, start: RunState) -> RunReport:
    """Train from a state to the end, in a Ray of the run's own or in the cluster of `ray.address`.

    Raises:
        ConfigError: what only the real data, model or grader could show.
        PlacementError: the cluster lacks resources.
        RunStopped: the run cannot go on sensibly.
    """
    progress = ConsoleProgress(config.training.steps, start.step)
    report = RunReport(name=config.name, folder=str(folder.path))
    with MemoryWatch() as memory, progress:
        progress.phase("reading model and data")
        evaluation = config.evaluation
        prepared = Prepared(config, evaluates=bool(evaluation.at_start or evaluation.at_end or evaluation.every))
        folder.write_config(config)  # a resumed run's may have changed
        with ray_session(config):
            run_to_end(_train(config, folder, start, prepared, progress, report))
        report.peak_bytes = memory.peak_bytes
    report.next_steps = _next_steps(report)
    (folder.path / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
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
        prepared = Prepared(config)
        with ray_session(config):
            return run_to_end(_evaluate(config, prepared, progress))


class Prepared:
    """What a run needs besides actors: the tokenizer, the prompts to train on, the prompts to evaluate on."""

    def __init__(self, config: RunConfig, *, evaluates: bool = True) -> None:
        """Read model and data; held-out problems only for a run that evaluates.

        Raises:
            ConfigError: one of them is not what the configuration says.
        """
        model = config.model
        task = make_task(config.task)
        self.codec = _tokenizer(config)
        encode = partial(
            encode_problem,
            self.codec,
            system_prompt=model.system_prompt,
            use_chat_template=model.chat_template,
            max_tokens=model.max_model_len - config.rollout.max_tokens,
        )
        self.stream = PromptStream(task.problems("train"), encode, seed=config.seed, shuffle=config.training.shuffle)
        held_out = task.problems("eval") if evaluates else ()
        count = min(len(held_out), config.evaluation.problems)
        self.evaluation_prompts = [encode(held_out[index], position=-1) for index in range(count)]


def _tokenizer(config: RunConfig) -> TokenizerCodec:
    model, source = config.model, model_source(config)
    try:
        return load_tokenizer(source, trust_remote_code=model.trust_remote_code, revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("model.path: ")
        raise ConfigError(f"model.path: no tokenizer could be loaded from {source}: {reason}") from error


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
) -> None:
    progress.phase("starting engines and learner")
    async with _actors(config, with_learner=True, step=start.step) as (pool, learner):
        assert learner is not None
        if start.step:
            await learner.load(folder.checkpoint(start.step) / "learner")
        recorder = GroupRecorder(
            folder.path / "groups.jsonl", config.logging.groups_per_step, prepared.codec, resume_step=start.step
        )
        sink = make_sink(folder.path, config.logging, resume_step=start.step)
        if start.step:
            report.evaluation_before = logged_metrics(folder.path / "metrics.jsonl", 0)
        orchestrator = Orchestrator(
            config,
            pool=pool,
            learner=learner,
            stream=prepared.stream,
            evaluation_prompts=prepared.evaluation_prompts,
            folder=folder,
            sink=sink,
            record=partial(_record, recorder, config),
            progress=progress,
            report=report,
        )
        with _signals(orchestrator, progress):
            try:
                await orchestrator.run(start)
            finally:
                sink.close()


async def _evaluate(config: RunConfig, prepared: Prepared, progress: ConsoleProgress) -> dict[str, float]:
    progress.phase("starting engines")
    async with _actors(config, with_learner=False) as (pool, _):
        progress.phase(f"evaluating on {len(prepared.evaluation_prompts)} held-out problems")
        return await evaluate(pool, prepared.evaluation_prompts, config.evaluation)


@asynccontextmanager
async def _actors(
    config: RunConfig, *, with_learner: bool, step: int = 0
) -> AsyncIterator[tuple[ActorPool, LearnerGroup | None]]:
    """All actors of a run, started side by side; ended together, whatever happens."""
    model, run_id = model_source(config), uuid.uuid4().hex[:12]
    reward_actors = create_reward_actors(config)
    clients = [
        create_rollout_client(config, model, run_id, index, reward_actors=reward_actors, step=step)
        for index in range(config.rollout.actors)
    ]
    pool = ActorPool(
        clients.__getitem__,
        config.rollout.actors,
        groups_in_flight=config.rollout.most_groups,
        start_timeout=config.rollout.start_timeout,
        group_timeout=config.rollout.group_timeout,
        publish_timeout=config.weights.timeout,
    )
    learner: LearnerGroup | None = None
    try:
        required = required_resources(config, with_learner=with_learner)
        await wait_for_resources(required, ray.cluster_resources, placement_seconds(config))
        async with asyncio.TaskGroup() as starting:
            starting.create_task(pool.start())
            starting.create_task(start_reward_actors(reward_actors, config.rollout.start_timeout))
            ranks = starting.create_task(LearnerGroup.start(config, model)) if with_learner else None
        learner = ranks.result() if ranks else None
        if learner:
            await learner.connect([client.handle for client in clients], run_id)
        yield pool, learner
    finally:
        # The learner first: on each node the last user of the run's files removes them, and it is killed without ado.
        if learner:
            learner.shutdown()
        try:
            await pool.shutdown()
        finally:  # also when the user would not wait for the engines
            for actor in reward_actors:
                ray.kill(actor)
            sweep(run_id)


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


async def _record(recorder: GroupRecorder, config: RunConfig, step: int, groups: Sequence[CollectedGroup]) -> None:
    """Fetch the few groups that the recorder wants, with the advantages that the learner gave them."""
    wanted = recorder.choose([collected.summary for collected in groups])
    for index in wanted:
        group = await wait(groups[index].ref, config.learner.step_timeout, what="a group to record")
        recorder.write(step, group, token_advantages(group, config.advantage))


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
