"""The shell around an engine and its rollout, which becomes a Ray actor in `actors.rollout_client`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.engine import Engine, NcclVerb
from actors.engine_args import prepare_environment, probe_tolerance
from actors.pool_member import WeightsGone
from actors.reward_actor import make_scorer
from actors.rollout import Rollout, summarize
from ray_rl.config import RunConfig
from ray_rl.deadlines import in_thread, result, wait
from ray_rl.run_logs import begin_log
from ray_rl.stacks import stacks
from ray_rl.tokenizer import load_tokenizer
from ray_rl.types import GroupSummary, Prompt, ScoredSample, TrajectoryGroup
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, Probe, WeightTransferError

logger = logging.getLogger(__name__)

STACKS_GROUP = "stacks"
"""Ray's concurrency group, and so the thread, of `RolloutActor.stacks`."""


class RolloutActor:
    """One engine, its rollouts, and the receiving end of weight publications."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        run_id: str,
        seed: int,
        reward_actors: Sequence[Any],
        log: Path | None = None,
    ) -> None:
        # Before anything imports torch or vllm. Handed to Ray it would cost a second, in which Ray's agent for that comes up.
        prepare_environment(config)
        begin_log(log)
        self._config = config
        self._model_path = model_path
        self._seed = seed
        model = config.model
        self._codec = load_tokenizer(model_path, trust_remote_code=model.trust_remote_code, revision=model.revision)
        self._scorer = make_scorer(config.reward, reward_actors)
        self._files = NodeWeightFile(run_id)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._proven = asyncio.Event()
        """Cleared while the engine may sample from weights that nobody has proven yet."""
        self._proven.set()

    async def start(self) -> None:
        """Load the engine."""
        self._loop = asyncio.get_running_loop()
        self._engine = await Engine.start(
            self._config, self._model_path, eos_token_ids=self._codec.eos_token_ids(), seed=self._seed
        )
        self._rollout = Rollout(self._config, self._engine, self._scorer, self._codec)
        logger.info("the engine is up, with the model %s", self._model_path)

    @ray.method(num_returns=2)
    async def collect(self, prompt: Prompt) -> tuple[TrajectoryGroup, GroupSummary]:
        """A group, which stays in this node's object store, and what the driver may know of it."""
        with self._engine.occupancy.group():
            group = await self._rollout.collect(prompt)
        await self._until_proven()
        return group, summarize(group)

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers without values."""
        answers = await self._rollout.evaluate(prompt, samples=samples, temperature=temperature)
        await self._until_proven()
        return answers

    async def receive_weights(self, payload: ObjectStorePayload | None) -> float:
        """Take new weights between two tokens of what runs, or once it is complete (weights.running).

        Args:
            payload: of the object store; None where NCCL has brought the weights already.

        Returns:
            Seconds in which the engine sampled nothing.

        Raises:
            WeightsGone: neither the learner's file nor the objects are there any more.
            WeightTransferError: what arrived is not what was published.
        """
        if payload is not None:
            path = await self._weight_file(payload)
            try:
                await self._engine.pause()
                self._proven.clear()
                await self._engine.receive_weights(payload.manifest, path)
            except WeightTransferError:
                if payload.home != self._files.identity:
                    # It may be of a version that was undone; whoever tries next writes it anew.
                    self._files.remove(payload.manifest.version)
                raise
            finally:
                await self._engine.resume()
        return self._engine.pause_seconds

    async def prove_weights(self, probe: Probe) -> float:
        """The probe's largest difference. What was sampled since the weights came is given away only then."""
        difference = await self._engine.prove(probe, probe_tolerance(self._config))
        self._proven.set()
        logger.info("policy version %d is proven: %.2g off at most", self._engine.policy_version, difference)
        return difference

    def take_underfull(self) -> float:
        """As `Occupancy.take_underfull`."""
        return self._engine.occupancy.take_underfull()

    async def nccl(self, verb: NcclVerb, info: dict[str, Any]) -> None:
        """One step of an NCCL transfer, driven by the learner."""
        if verb == "start":
            self._proven.clear()
        await self._engine.nccl(verb, info)

    def weight_file_identity(self) -> str:
        """As `NodeWeightFile.identity`."""
        return self._files.identity

    @ray.method(concurrency_group=STACKS_GROUP)
    async def stacks(self) -> str:
        """What this process is doing; answers also while the event loop of all other methods hangs."""
        return stacks(self._loop)

    def shutdown(self) -> None:
        """End the engine and give up the node's files."""
        logger.info("ends")
        if engine := getattr(self, "_engine", None):
            engine.shutdown()
        self._files.close()

    async def _weight_file(self, payload: ObjectStorePayload) -> Path:
        """A version's file on this node: the learner's own, or one that the first who asks writes from the objects."""
        version, timeout = payload.manifest.version, self._config.weights.timeout
        path = self._files.path(version)
        if payload.home == self._files.identity and path.exists():
            return path
        if not payload.chunks:
            raise WeightsGone(f"{path}, which the learner would have written, is not there")
        chunks = _chunks(payload.chunks, asyncio.get_running_loop(), timeout)
        # In a thread: the engine goes on answering while hundreds of megabytes are written.
        write = partial(self._files.ensure, version, lambda: chunks, timeout=timeout)
        try:
            return await in_thread(write, 2 * timeout, what=f"the file of policy version {version}")
        except ObjectLostError as error:
            raise WeightsGone(f"policy version {version} is gone with the process that stored it") from error

    async def _until_proven(self) -> None:
        """An engine that fails the proof is ended, and what it sampled meanwhile with it."""
        seconds = self._config.rollout.group_timeout
        await wait(self._proven.wait(), seconds, what="the proof of the weights that a group was sampled with")


def _chunks(refs: Sequence[Any], loop: asyncio.AbstractEventLoop, timeout: float) -> Iterator[memoryview]:
    """The published bytes, one object at a time; only who writes the node's file asks for them."""
    for ref in refs:
        what = "a chunk of the new weights"
        fetched = asyncio.run_coroutine_threadsafe(wait(ref, timeout, what=what), loop)
        yield memoryview(result(fetched, 2 * timeout, what=what))
