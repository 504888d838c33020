"""The @ray.remote shell around an engine and its rollout, and the client through which the pool speaks to it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.engine import Engine, EngineDied, NcclVerb
from actors.engine_args import engine_environment
from actors.pool import ActorDied
from actors.reward_actor import make_scorer
from actors.rollout import Rollout, summarize
from ray_rl.config import RunConfig
from ray_rl.deadlines import DeadlineExceeded, wait
from ray_rl.protocols import CollectedGroup, PublishedWeights
from ray_rl.tokenizer import load_tokenizer
from ray_rl.types import GroupSummary, Prompt, ScoredSample, TrajectoryGroup
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, Probe

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FLOAT32_TOLERANCE = 1e-4
_HALF_TOLERANCE = 0.25
_END_SECONDS = 30.0


class RolloutActor:
    """One engine, its rollouts, and the receiving end of weight publications. Becomes an actor in `create_rollout_client`."""

    def __init__(
        self, config: RunConfig, model_path: str, run_id: str, seed: int, reward_actors: Sequence[Any]
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._seed = seed
        model = config.model
        self._codec = load_tokenizer(model_path, trust_remote_code=model.trust_remote_code, revision=model.revision)
        self._scorer = make_scorer(config.reward, reward_actors)
        self._files = NodeWeightFile(run_id)

    async def start(self) -> None:
        """Load the engine."""
        self._engine = await Engine.start(
            self._config, self._model_path, eos_token_ids=self._codec.eos_token_ids(), seed=self._seed
        )
        self._rollout = Rollout(self._config, self._engine, self._scorer, self._codec)

    @ray.method(num_returns=2)
    async def collect(self, prompt: Prompt) -> tuple[TrajectoryGroup, GroupSummary]:
        """A group, which stays in this node's object store, and what the driver may know of it."""
        with self._engine.occupancy.group():
            group = await self._rollout.collect(prompt)
        return group, summarize(group)

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers without values."""
        return await self._rollout.evaluate(prompt, samples=samples, temperature=temperature)

    async def receive_weights(self, payload: ObjectStorePayload | None) -> float:
        """Take new weights between two tokens of what runs, or once it is complete (weights.running).

        Args:
            payload: of the object store; None where NCCL has brought the weights already.

        Returns:
            Seconds in which the engine sampled nothing.
        """
        if payload is not None:
            path = await asyncio.to_thread(self._write_file, payload, asyncio.get_running_loop())
            try:
                await self._engine.pause()
                await self._engine.receive_weights(payload.manifest, path)
            finally:
                await self._engine.resume()
        return self._engine.pause_seconds

    async def prove_weights(self, probe: Probe) -> float:
        """The probe's largest difference."""
        return await self._engine.prove(probe, self._tolerance())

    def take_underfull(self) -> float:
        """As `Occupancy.take_underfull`."""
        return self._engine.occupancy.take_underfull()

    async def nccl(self, verb: NcclVerb, info: dict[str, Any]) -> None:
        """One step of an NCCL transfer, driven by the learner."""
        await self._engine.nccl(verb, info)

    def weight_file_identity(self) -> str:
        """As `NodeWeightFile.identity`."""
        return self._files.identity

    def discard_weights(self, version: int) -> None:
        """Remove the version's file from this node; the engines have what they need."""
        self._files.discard(version)

    def shutdown(self) -> None:
        """End the engine and give up the node's files."""
        if engine := getattr(self, "_engine", None):
            engine.shutdown()
        self._files.close()

    def _write_file(self, payload: ObjectStorePayload, loop: asyncio.AbstractEventLoop) -> Path:
        """Runs in a thread: the engine goes on answering while hundreds of megabytes are written."""
        timeout = self._config.weights.timeout
        return self._files.ensure(
            payload.manifest.version, lambda: _chunks(payload.chunks, loop, timeout), timeout=timeout
        )

    def _tolerance(self) -> float:
        configured = self._config.weights.probe_tolerance
        default = _FLOAT32_TOLERANCE if self._config.model.dtype == "float32" else _HALF_TOLERANCE
        return default if configured is None else configured


class RayRolloutClient:
    """One `RolloutActor`, as the pool sees it."""

    def __init__(self, handle: Any, name: str) -> None:
        """Wrap the handle of an actor that may still be starting."""
        self._handle = handle
        self.name = name

    @property
    def handle(self) -> Any:
        """The Ray actor."""
        return self._handle

    async def start(self) -> None:
        """Wait until the engine is loaded."""
        await _result(self._handle.start.remote())

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """One group."""
        group, summary = self._handle.collect.remote(prompt)
        return CollectedGroup(prompt=prompt, ref=group, summary=await _result(summary))

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

    async def discard_weights(self, version: int) -> None:
        """Remove what the transfer left on the actor's node."""
        await _result(self._handle.discard_weights.remote(version))

    async def shutdown(self) -> None:
        """End the engine, then the actor."""
        try:
            await wait(_result(self._handle.shutdown.remote()), _END_SECONDS, what=f"{self.name} to end its engine")
        except (ActorDied, DeadlineExceeded, RayTaskError) as error:
            logger.info("%s did not end by itself: %s", self.name, error)
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
    kind: type[RolloutActor] = RolloutActor,
) -> RayRolloutClient:
    """Create rollout actor `index` with the resources of its engine.

    Its sampling follows from the run's seed, the index and the step that the run (re)starts after, so that a resumed run
    draws new numbers.
    """
    rollout = config.rollout
    handle = (
        ray.remote(kind)
        .options(
            num_cpus=rollout.cpus_per_actor,
            num_gpus=rollout.gpus_per_actor,
            # Groups, answers to evaluation prompts, and room for what must not wait behind them.
            max_concurrency=100 + 8 * rollout.most_groups,
            runtime_env={"env_vars": engine_environment(config)},
        )
        .remote(config, model_path, run_id, _engine_seed(config.seed, step, index), reward_actors)
    )
    return RayRolloutClient(handle, f"rollout actor {index}")


def _engine_seed(seed: int, step: int, index: int) -> int:
    return random.Random(f"{seed}:{step}:{index}").randrange(2**31)


async def _result(ref: Awaitable[T]) -> T:
    """Await a call to an actor; its own errors come as what they were, its death or its engine's as `ActorDied`."""
    try:
        return await ref
    except EngineDied as error:
        raise ActorDied(str(error.cause) if isinstance(error, RayTaskError) else str(error)) from error
    except RayActorError as error:
        raise ActorDied(str(error).splitlines()[0]) from error


def _chunks(refs: Sequence[Any], loop: asyncio.AbstractEventLoop, timeout: float) -> Iterator[memoryview]:
    """The published bytes, one object at a time; only who writes the node's file asks for them."""
    for ref in refs:
        fetched = asyncio.run_coroutine_threadsafe(wait(ref, timeout, what="a chunk of the new weights"), loop)
        yield memoryview(fetched.result())
