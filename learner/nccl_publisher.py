"""The sending end of vLLM's own NCCL transfer. GPUs only; the tests run vLLM's sender over a pretended communicator.

The sender is the learner's rank 0; every GPU of every rollout engine is a rank of one NCCL group behind it. The group is fixed
when it is made: when an engine joins or dies, close the publisher and make a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from learner.weight_publisher import WeightOwner
from ray_rl.deadlines import get, result
from ray_rl.errors import RunError

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdatePayload


class DeepSpeedSource(WeightSource):
    """The learner's parameters as vLLM wants them; gathers under ZeRO-3, which vLLM's ModuleSource cannot."""

    def __init__(self, engine: WeightOwner) -> None:
        """Wrap this rank's engine."""
        self._engine = engine

    def metadata(self) -> list[ParamMeta]:
        """Name, number format and shape of every parameter; known without gathering."""
        return [ParamMeta(*of_one) for of_one in self._engine.parameter_shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors on this rank's device; a collective."""
        return self._engine.named_parameters_gathered()


class RolloutActorsClient:
    """vLLM's VLLMWeightSyncClient over rollout actors, each of which has `nccl(verb, info)` (see actors.engine.Engine.nccl)."""

    def __init__(self, actors: Sequence[Any], *, gpus_per_engine: int, timeout: float) -> None:
        """Speak to all actors as one.

        Args:
            actors: Ray handles.
            gpus_per_engine: ranks of the NCCL group that each engine makes up.
            timeout: seconds that one step may take.
        """
        self._actors = actors
        self._gpus_per_engine = gpus_per_engine
        self._timeout = timeout
        self.version = 0
        """Label of the version that is sent next."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every engine join the group; each needs ranks of its own, which vLLM leaves to us."""
        first = init_info["rank_offset"]
        offsets = (first + index * self._gpus_per_engine for index in range(len(self._actors)))
        self._all("init", [{**init_info, "rank_offset": offset} for offset in offsets])

    def start_weight_update(self) -> None:
        """Pause the engines."""
        self._all("start", [{"version": self.version}] * len(self._actors))

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """Receive, while the sender broadcasts."""
        self._all("update", [update_info] * len(self._actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Label the weights and resume."""
        version = self.version if weight_version is None else int(weight_version)
        self._all("finish", [{"version": version}] * len(self._actors))

    def _all(self, verb: str, infos: Sequence[Any]) -> None:
        calls = [actor.nccl.remote(verb, info) for actor, info in zip(self._actors, infos, strict=True)]
        get(calls, self._timeout, what=f"step {verb} of an NCCL transfer in {len(calls)} engines")


class NcclPublisher:
    """Publishes straight into the engines' GPUs, which run on the new weights when `publish` returns; the proof is left."""

    def __init__(
        self,
        engine: WeightOwner,
        actors: Sequence[Any],
        *,
        address: str,
        port: int,
        gpus_per_engine: int,
        timeout: float,
    ) -> None:
        """Form the group. A collective: every rank calls it.

        Args:
            engine: of this rank.
            actors: handles of all rollout actors.
            address: of rank 0's node, as the engines reach it.
            port: free on that node.
            gpus_per_engine: rollout.tensor_parallel.
            timeout: seconds that forming the group, or one publication, may take.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._engine = engine
        self._timeout = timeout
        self._client = RolloutActorsClient(actors, gpus_per_engine=gpus_per_engine, timeout=timeout)
        info = NCCLTrainerInitInfo(
            rank=engine.rank,
            master_address=address,
            master_port=port,
            world_size=1 + gpus_per_engine * len(actors),
        )
        self._sender = self._in_time(
            lambda: WeightTransferTrainerFactory.trainer_init(
                init_info=info, client=self._client, source=DeepSpeedSource(engine)
            ),
            "the NCCL group of learner and engines",
        )
        if self._sender.is_sender and self._sender.model_update_group.disabled:
            # vLLM only logs it, sends nothing, and the engines would load what lies in their memory.
            raise RunError(
                "weights.kind: nccl, but vLLM finds no NCCL library in the learner's process; install the CUDA build, unset "
                "VLLM_DISABLE_PYNCCL, or use weights.kind=object_store"
            )

    def publish(self, version: int) -> None:
        """Send the present weights. A collective: every rank calls it.

        Raises:
            DeadlineExceeded: it took too long. The group is then unusable, and so is this process for another one.
        """
        # vLLM reads the parameters on streams of its own, which know nothing of the optimizer's.
        torch.get_device_module(self._engine.device).synchronize()
        self._client.version = version
        self._in_time(self._sender.send_weights, f"version {version} to be sent by NCCL")

    def close(self) -> None:
        """Leave the group. The engines leave it when they join the next one."""
        self._sender.shutdown()

    def _in_time(self, function: Callable[[], Any], what: str) -> Any:
        """Run in a thread, for NCCL waits for ever where a peer is missing."""

        def on_device() -> Any:
            torch.get_device_module(self._engine.device).set_device(self._engine.device)
            return function()

        pool = ThreadPoolExecutor(max_workers=1)
        try:
            return result(
                pool.submit(on_device), self._timeout, what=what, causes="an engine of the group died or hangs"
            )
        finally:
            pool.shutdown(wait=False)
