"""The Ray shell of one rank. All ranks get the same calls in the same order, for most of them are collectives."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from learner.checkpoint import export_model, load_checkpoint, save_checkpoint
from learner.distributed import host_store, join_store
from learner.engine import LearnerEngine
from learner.samples import training_samples
from learner.stored_checkpoint import load_stored_checkpoint, store_checkpoint, store_model
from learner.weight_publisher import ObjectStorePublisher, make_probe
from ray_rl.config.run import RunConfig
from ray_rl.config.weights import ObjectStoreWeights
from ray_rl.deadlines import Deadline, DeadlineExceeded, get
from ray_rl.errors import RunError
from ray_rl.inventory import FileEntry
from ray_rl.object_store import ObjectStore, Place
from ray_rl.run_logs import keep_log
from ray_rl.stacks import stacks
from ray_rl.types import TrajectoryGroup
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, Probe

if TYPE_CHECKING:
    from learner.nccl_publisher import NcclPublisher

logger = logging.getLogger(__name__)

_WATCH = "watch"
"""Verbs that are answered beside the others. Those then share one thread, which is not the process's main thread."""


@ray.remote(concurrency_groups={_WATCH: 1})
class LearnerActor:
    """One rank of the learner.

    Args:
        config: the run's.
        model_path: folder or Hugging Face name of the initial policy.
        run_id: under which the run's files lie in each node's memory.
        rank: of this process, in range(config.learner.ranks).
        log: where it logs, if it does.
    """

    def __init__(self, config: RunConfig, model_path: str, run_id: str, rank: int, log: Path | None = None) -> None:
        keep_log(log, "DeepSpeed")
        self._config = config
        self._model_path = model_path
        self._run_id = run_id
        self._rank = rank
        self._store: torch.distributed.Store | None = None
        self._groups: list[TrajectoryGroup] = []
        self._stored: ObjectStorePublisher | None = None
        self._sent: NcclPublisher | None = None

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
        ranks, weights = self._config.learner.ranks, self._config.weights
        self._address = address
        store = self._store or join_store(address, port, ranks)
        self._engine = LearnerEngine(self._config, self._model_path, self._rank, ranks, store)
        logger.info("rank %d of %d has the policy %s", self._rank, ranks, self._model_path)
        if isinstance(weights, ObjectStoreWeights):
            self._stored = ObjectStorePublisher(
                self._engine, NodeWeightFile(self._run_id), chunk_mib=weights.chunk_mib, timeout=weights.timeout
            )

    def fetch(self, refs: Sequence[ray.ObjectRef]) -> list[int]:
        """Get the groups that `train` takes next, behind references which travel in a list so that Ray leaves them alone.

        Every rank fetches every group: that keeps whitening, counts and the sharing of the work local computations.

        Returns:
            Indices of those that are gone, or did not come within `learner.step_timeout`.
        """
        deadline = Deadline(self._config.learner.step_timeout, what=f"{len(refs)} groups")
        try:
            self._groups = cast(list[TrajectoryGroup], _fetched(list(refs), deadline))
            return []
        except _GONE:
            self._groups = []
        gone = []
        for index, ref in enumerate(refs):
            try:
                self._groups.append(cast(TrajectoryGroup, _fetched(ref, deadline)))
            except _GONE:
                gone.append(index)
        return gone

    def train(self, step: int) -> dict[str, float]:
        """One training step on the groups of the last `fetch`."""
        samples = [sample for group in self._groups for sample in training_samples(group, self._config)]
        self._groups = []
        metrics = self._engine.train(samples, step)
        logger.info("step %d is trained, on %d samples", step, len(samples))
        return metrics

    def publish(self, version: int, homes: Collection[str], stored: bool) -> ObjectStorePayload | None:
        """As `ObjectStorePublisher.publish`."""
        assert self._stored is not None
        return self._stored.publish(version, homes, stored=stored)

    def send(self, version: int, actors: Sequence[Any], port: int | None) -> None:
        """The current policy by NCCL into the engines of rollout actors. A collective.

        Args:
            version: its label.
            actors: Ray handles.
            port: free on rank 0's node, to form a group with these actors; None: they are those of the last call.
        """
        if port is not None:
            from learner.nccl_publisher import NcclPublisher

            if self._sent is not None:
                self._sent.close()
            self._sent = NcclPublisher(
                self._engine,
                actors,
                address=self._address,
                port=port,
                gpus_per_engine=self._config.rollout.tensor_parallel,
                timeout=self._config.weights.timeout,
            )
        assert self._sent is not None
        self._sent.publish(version)

    def probe(self) -> Probe:
        """What an engine with the current policy must compute."""
        return make_probe(self._engine)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """As `LearnerEngine.logprobs`."""
        return self._engine.logprobs(token_ids)

    def reach(self, store: ObjectStore) -> None:
        """See that this rank can write into a store.

        Raises:
            RunError: it cannot.
        """
        try:
            store.prove()
        except RunError as error:
            raise RunError(f"rank {self._rank} of the learner, on {socket.gethostname()}: {error}") from error

    def save(self, folder: Place) -> dict[str, FileEntry]:
        """As `save_checkpoint`; or as `store_checkpoint`, with what this rank put there."""
        if isinstance(folder, ObjectStore):
            return store_checkpoint(self._engine, folder)
        save_checkpoint(self._engine, folder)
        return {}

    def load(self, folder: Place) -> None:
        """As `load_checkpoint` or `load_stored_checkpoint`."""
        if isinstance(folder, ObjectStore):
            load_stored_checkpoint(self._engine, folder)
        else:
            load_checkpoint(self._engine, folder)

    def export(self, folder: Place) -> dict[str, FileEntry]:
        """As `export_model`; or as `store_model`, with what this rank put there."""
        if isinstance(folder, ObjectStore):
            return store_model(self._engine, self._model_path, folder)
        export_model(self._engine, self._model_path, folder)
        return {}

    @ray.method(concurrency_group=_WATCH)
    def stacks(self) -> str:
        """What this process is doing, also while another verb runs."""
        return stacks()


_GONE = (ObjectLostError, RayActorError, RayTaskError, DeadlineExceeded)
"""What getting a group says when nobody has it any more: its node or owner is gone, or who made it failed after all."""


def _fetched(refs: object, deadline: Deadline) -> object:
    return get(refs, deadline.left, what="groups to train on")
