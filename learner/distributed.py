"""How the ranks meet, and which device they compute on. Imports DeepSpeed late: its accelerator is decided by then."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from torch import Tensor

from ray_rl.config.learner import LearnerConfig


def choose_device(config: LearnerConfig) -> torch.device:
    """CUDA when the ranks own GPUs and torch sees one, else the CPU; tells DeepSpeed before its first import.

    Raises:
        RuntimeError: GPUs were asked for and torch sees none.
    """
    if config.gpus_per_rank > 0 and not torch.cuda.is_available():
        raise RuntimeError("learner.gpus_per_rank: torch sees no GPU here; set it to 0 or install a CUDA build")
    if config.gpus_per_rank > 0:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def host_store(world_size: int, address: str = "127.0.0.1") -> torch.distributed.TCPStore:
    """The meeting point, on a port the system chooses (`store.port`); rank 0 keeps it alive as long as the group."""
    return torch.distributed.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False)


def join_store(address: str, port: int, world_size: int) -> torch.distributed.TCPStore:
    """Another rank's meeting point."""
    return torch.distributed.TCPStore(address, port, world_size, is_master=False)


def meet(
    device: torch.device, rank: int, world_size: int, timeout: float, store: torch.distributed.Store | None = None
) -> None:
    """Start torch.distributed (gloo on CPU, NCCL on CUDA) and DeepSpeed's communication on top; once per process.

    Args:
        device: from `choose_device`.
        rank: of this process.
        world_size: ranks that meet.
        timeout: seconds a collective may take before it fails.
        store: where they meet; needed with more than one rank.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store or torch.distributed.HashStore(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to rename, and torch says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.* is deprecated")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collective serves inference only, and building it would cost a minute of compilation.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; the same on all ranks afterwards."""
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """In place; the same on all ranks afterwards."""
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor
