"""What vLLM is told about CPUs, GPUs, parts of GPUs and several of them; and what proves an engine's weights there."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, get_args

import pytest

from actors.engine_args import (
    WEIGHT_BACKEND,
    engine_args,
    engine_environment,
    prepare_environment,
    probe_tolerance,
    shutdown_seconds,
)
from ray_rl.config import RunConfig, resolve_config

GIB = 2**30


def config(*overrides: str) -> RunConfig:
    return resolve_config({}, overrides)


def args(*overrides: str) -> dict[str, Any]:
    return engine_args(config(*overrides), "/models/policy", seed=7)


def test_every_argument_is_one_of_vllms() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert args().keys() <= known
    assert args("rollout.gpus_per_actor=1", "rollout.kv_cache_gib=2").keys() <= known


def test_vllm_knows_the_executors_and_the_transfer_that_it_is_told() -> None:
    from vllm.config.parallel import DistributedExecutorBackend
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    executors = get_args(DistributedExecutorBackend)
    for gpus in (1, 2):
        told = args(f"rollout.gpus_per_actor={gpus}", f"rollout.tensor_parallel={gpus}")
        assert told["distributed_executor_backend"] in executors
    assert "nccl" in WeightTransferEngineFactory._registry
    assert "nccl" in WeightTransferTrainerFactory._registry


def test_an_engine_on_a_cpu_is_one_eager_process_with_a_cache_of_a_size_that_is_said() -> None:
    told = args()
    assert told["distributed_executor_backend"] == "uni"
    assert told["enforce_eager"] is True
    assert told["kv_cache_memory_bytes"] == GIB
    assert "gpu_memory_utilization" not in told
    assert told["weight_transfer_config"] == {"backend": WEIGHT_BACKEND}


def test_an_engine_on_a_gpu_captures_graphs_and_takes_its_share_of_the_memory() -> None:
    told = args("rollout.gpus_per_actor=1", "model.dtype=bfloat16")
    assert told["distributed_executor_backend"] == "uni"
    assert told["enforce_eager"] is False
    assert told["gpu_memory_utilization"] == 0.85
    assert "kv_cache_memory_bytes" not in told
    assert told["dtype"] == "bfloat16"
    assert told["tensor_parallel_size"] == 1


def test_gpus_that_share_an_engine_are_processes_below_the_actor_which_holds_them_all() -> None:
    told = args("rollout.gpus_per_actor=2", "rollout.tensor_parallel=2")
    assert told["distributed_executor_backend"] == "mp"
    assert told["tensor_parallel_size"] == 2
    assert told["gpu_memory_utilization"] == 0.85


def test_half_a_gpu_is_half_of_its_memory() -> None:
    told = args("rollout.gpus_per_actor=0.5", "rollout.kv_cache_gib=2")
    assert told["gpu_memory_utilization"] == pytest.approx(0.425)
    assert told["kv_cache_memory_bytes"] == 2 * GIB
    assert told["distributed_executor_backend"] == "uni"


def test_nccl_is_vllms_own_transfer() -> None:
    told = args("rollout.gpus_per_actor=1", "learner.gpus_per_rank=1", "weights.kind=nccl")
    assert told["weight_transfer_config"] == {"backend": "nccl"}


def test_only_an_engine_on_a_cpu_has_the_threads_and_the_process_of_its_actor() -> None:
    on_cpu, on_gpu = engine_environment(config()), engine_environment(config("rollout.gpus_per_actor=1"))
    assert on_cpu["OMP_NUM_THREADS"] == "1"
    assert on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"} & on_gpu.keys()
    assert on_gpu["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    # Which GPUs it has is Ray's to say.
    assert not any("CUDA" in name for name in on_gpu)


def test_an_engine_on_gpus_gets_the_time_to_end_its_communicators() -> None:
    assert shutdown_seconds(config("rollout.gpus_per_actor=1")) > shutdown_seconds(config())


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ((), 1e-4),
        (("rollout.gpus_per_actor=1",), 0.05),
        (("model.dtype=bfloat16",), 1.0),
        (("model.dtype=bfloat16", "rollout.gpus_per_actor=1"), 1.0),
        (("model.dtype=bfloat16", "weights.probe_tolerance=0.1"), 0.1),
    ],
)
def test_the_proof_is_as_exact_as_the_numbers_are(overrides: tuple[str, ...], tolerance: float) -> None:
    assert probe_tolerance(config(*overrides)) == tolerance


@pytest.mark.parametrize(
    ("chosen", "eager", "bare"), [("true", True, True), ("null", True, False), ("false", False, False)]
)
def test_an_engine_on_cpu_is_eager_unless_told_otherwise_and_compiles_nothing_at_all_when_asked(chosen, eager, bare):
    asked = config(f"rollout.enforce_eager={chosen}")
    assert engine_args(asked, "model", seed=0)["enforce_eager"] is eager
    assert ("TORCHDYNAMO_DISABLE" in engine_environment(asked)) is bare


def test_an_engine_on_a_gpu_is_left_to_vllm():
    on_gpu = config("rollout.gpus_per_actor=1")
    assert "TORCHDYNAMO_DISABLE" not in engine_environment(on_gpu)


def test_what_the_engine_inherits_is_in_its_parent_s_environment(monkeypatch):
    for name in (*engine_environment(config()), "VLLM_CPU_KVCACHE_SPACE", "RAY_RL_ENGINE_OWNER_PID"):
        monkeypatch.setenv(name, "of the shell")
    prepare_environment(config())
    assert engine_environment(config()).items() <= os.environ.items()
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert os.environ["RAY_RL_ENGINE_OWNER_PID"] == str(os.getpid())
