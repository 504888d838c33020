"""The Ray shell of one rank. All ranks get the same calls in the same order, for most of them are collectives."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import torch

from learner.checkpoint import export_model, load_checkpoint, save_checkpoint
from learner.distributed import host_store, join_store
from learner.engine import LearnerEngine
from learner.samples import training_samples
from learner.weight_publisher import ObjectStorePublisher, make_probe
from ray_rl import deadlines
from ray_rl.config.run import RunConfig
from ray_rl.config.weights import ObjectStoreWeights
from ray_rl.types import TrajectoryGroup
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, Probe

if TYPE_CHECKING:
    from learner.nccl_publisher import NcclPublisher


@ray.remote
class LearnerActor:
    """One rank of the learner.

    Args:
        config: the run's.
        model_path: folder or Hugging Face name of the initial policy.
        rank: of this process, in range(config.learner.ranks).
    """

    def __init__(self, config: RunConfig, model_path: str, rank: int) -> None:
        self._config = config
        self._model_path = model_path
        self._rank = rank
        self._store: torch.distributed.Store | None = None
        self._publisher: ObjectStorePublisher | NcclPublisher

    def host(self) -> tuple[str, int]:
        """Open the ranks' meeting point on this node; its address and port."""
        address = ray.util.get_node_ip_address()
        store = host_store(self._config.learner.ranks, address)
        self._store = store
        return address, store.port

    def free_port(self) -> int:
        """A port of this node that nobody listens on."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return listener.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Meet the other ranks and load the policy."""
        ranks = self._config.learner.ranks
        self._address = address
        store = self._store or join_store(address, port, ranks)
        self._engine = LearnerEngine(self._config, self._model_path, self._rank, ranks, store)

    def train(self, step: int, refs: Sequence[ray.ObjectRef]) -> dict[str, float]:
        """One training step on the groups behind the references, which travel in a list so that Ray leaves them alone.

        Every rank fetches every group: that keeps whitening, counts and the sharing of the work local computations.
        """
        what = f"the {len(refs)} groups of step {step}"
        fetched = deadlines.get(list(refs), self._config.learner.step_timeout, what=what)
        groups = cast(list[TrajectoryGroup], fetched)
        samples = [sample for group in groups for sample in training_samples(group, self._config)]
        return self._engine.train(samples, step)

    def connect(self, rollout_actors: Sequence[Any], run_id: str, port: int) -> None:
        """Make the sending end of `weights.kind`. A collective.

        Args:
            rollout_actors: handles of all rollout actors.
            run_id: under which the run's files lie in each node's memory.
            port: free on rank 0's node, for NCCL's rendezvous.
        """
        weights = self._config.weights
        if isinstance(weights, ObjectStoreWeights):
            files = NodeWeightFile(run_id)
            told = [actor.weight_file_identity.remote() for actor in rollout_actors]
            what = "the rollout actors to say where their files lie"
            seen = cast(list[str], deadlines.get(told, weights.timeout, what=what))
            self._publisher = ObjectStorePublisher(
                self._engine,
                files,
                chunk_mib=weights.chunk_mib,
                timeout=weights.timeout,
                engines_here=files.identity in seen,
                engines_elsewhere=any(identity != files.identity for identity in seen),
            )
            return
        from learner.nccl_publisher import NcclPublisher

        self._publisher = NcclPublisher(
            self._engine,
            rollout_actors,
            address=self._address,
            port=port,
            gpus_per_engine=self._config.rollout.tensor_parallel,
            timeout=weights.timeout,
        )

    def publish(self, version: int) -> ObjectStorePayload | None:
        """The current policy as a new version, after `connect`; None on ranks other than 0, and after a transfer by NCCL."""
        return self._publisher.publish(version)

    def probe(self) -> Probe:
        """What an engine with the current policy must compute."""
        return make_probe(self._engine)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """As `LearnerEngine.logprobs`."""
        return self._engine.logprobs(token_ids)

    def save(self, folder: Path) -> None:
        """As `save_checkpoint`."""
        save_checkpoint(self._engine, folder)

    def load(self, folder: Path) -> None:
        """As `load_checkpoint`."""
        load_checkpoint(self._engine, folder)

    def export(self, folder: Path) -> None:
        """As `export_model`."""
        export_model(self._engine, self._model_path, folder)
