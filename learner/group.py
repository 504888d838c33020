"""The ranks of the learner as one: `ray_rl.protocols.Learner`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from ray_rl import deadlines
from ray_rl.config.learner import LearnerConfig
from ray_rl.config.run import RunConfig
from ray_rl.protocols import CollectedGroup, PublishedWeights
from ray_rl.types import StepStats
from ray_rl.weight_manifest import Probe

_CPU_MEMORY = {
    # glibc would give the memory of each large tensor back to the system and fetch it anew, zeroed page by page, for the next
    # one: up to a tenth of a training step. Kept, it is the peak that every step needs anyway.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""How a rank without a GPU keeps its memory; what the user's shell sets wins."""


class LearnerGroup:
    """Made by `start`; a rank that fails or is late fails the call, after which only `shutdown` makes sense."""

    def __init__(self, config: LearnerConfig, actors: Sequence[Any]) -> None:
        self._config = config
        self._actors = list(actors)

    @classmethod
    async def start(cls, config: RunConfig, model_path: str) -> LearnerGroup:
        """One actor per rank; returns when all have loaded the policy and met.

        Args:
            config: the run's.
            model_path: folder (on every node) or Hugging Face name of the initial policy.

        Raises:
            DeadlineExceeded: `learner.start_timeout` passed, for instance because the resources are not there.
            ray.exceptions.RayError: a rank failed.
        """
        group = cls(config.learner, [_rank_actor(config, model_path, rank) for rank in range(config.learner.ranks)])
        try:
            await deadlines.wait(group._meet(), config.learner.start_timeout, what="the learner's ranks to start")
        except BaseException:
            group.shutdown()
            raise
        return group

    async def _meet(self) -> None:
        address, port = await self._actors[0].host.remote()
        await asyncio.gather(*(actor.start.remote(address, port) for actor in self._actors))

    async def connect(self, rollout_actors: Sequence[Any], run_id: str) -> None:
        """Make the sending end of `weights.kind`, towards the rollout actors of this run."""
        port = await deadlines.wait(
            self._actors[0].free_port.remote(), self._config.start_timeout, what="a free port on the learner's node"
        )
        what = "the learner to meet the rollout actors"
        await self._on_all_ranks("connect", list(rollout_actors), run_id, port, what=what)

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """One training step; every rank fetches the groups and trains on its share."""
        refs = [group.ref for group in groups]
        metrics, *_ = await self._on_all_ranks("train", step, refs, what=f"training step {step}")
        return StepStats(metrics=metrics)

    async def publish(self, version: int) -> PublishedWeights:
        """The current policy as a new version."""
        payload, *_ = await self._on_all_ranks("publish", version, what=f"the publication of version {version}")
        return PublishedWeights(version=version, payload=payload, probe=self._probe)

    async def _probe(self) -> Probe:
        probe, *_ = await self._on_all_ranks("probe", what="the learner's log-probabilities of the probe prompt")
        return probe

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:] under the current policy at temperature 1; [P - 1] for [P] tokens."""
        logprobs, *_ = await self._on_all_ranks("logprobs", tuple(token_ids), what="the learner's log-probabilities")
        return logprobs

    async def save(self, folder: Path) -> None:
        """Everything a resumed run needs of the learner, in a folder that all ranks' nodes share."""
        await self._on_all_ranks("save", folder, what=f"the checkpoint {folder}")

    async def load(self, folder: Path) -> None:
        """The inverse of `save`, before the first training step."""
        await self._on_all_ranks("load", folder, what=f"loading the checkpoint {folder}")

    async def export(self, folder: Path) -> None:
        """The policy in Hugging Face format."""
        await self._on_all_ranks("export", folder, what=f"the export {folder}")

    def shutdown(self) -> None:
        """End the ranks' processes; harmless when they are gone."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    async def _on_all_ranks(self, method: str, *args: object, what: str) -> list[Any]:
        """Results by rank. The first failure is raised at once: the others may be stuck waiting for the failed rank."""
        results = asyncio.gather(*(getattr(actor, method).remote(*args) for actor in self._actors))
        return await deadlines.wait(results, self._config.step_timeout, what=what)


def _rank_actor(config: RunConfig, model_path: str, rank: int) -> ray.actor.ActorHandle:
    from learner.learner_actor import LearnerActor

    learner = config.learner
    # Ray shows each rank its own GPUs only, so that every rank's device is the first.
    env_vars = {"RANK": str(rank), "WORLD_SIZE": str(learner.ranks), "LOCAL_RANK": "0"}
    if learner.gpus_per_rank == 0:
        env_vars["DS_ACCELERATOR"] = "cpu"
        env_vars |= {name: os.environ.get(name, value) for name, value in _CPU_MEMORY.items()}
    return LearnerActor.options(  # type: ignore[attr-defined]
        num_cpus=learner.cpus_per_rank, num_gpus=learner.gpus_per_rank, runtime_env={"env_vars": env_vars}
    ).remote(config, model_path, rank)
