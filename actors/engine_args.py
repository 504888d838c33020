"""RunConfig -> arguments and environment of a vLLM engine. Every difference between CPU and GPU engines lives here."""

from __future__ import annotations

import os
from typing import Any

from ray_rl.config import RunConfig

WEIGHT_BACKEND = "ray_rl_shared_memory"
"""Name under which our receiver is registered in vLLM's weight transfer API."""
WORKER_EXTENSION = "actors.weight_receiver.WeightReceiverExtension"
"""vLLM imports this module in every worker before it looks up the backend, so it is where the backend registers itself."""
OWNER_PID = "RAY_RL_ENGINE_OWNER_PID"
"""Environment variable: the process with which an engine's processes must die."""

_GIB = 1024**3
_CPU_KV_CACHE_GIB = 1.0

_CPU_TOLERANCE = 1e-4
# vLLM's attention kernel for float32 on GPUs, Triton's, multiplies in TF32, which keeps 10 bits.
_GPU_TOLERANCE = 0.05
# In 16 bits a logit of 20 is a multiple of 1/8, and a probe has tokens that no policy would say; another policy is nats away.
_HALF_TOLERANCE = 1.0


def engine_args(config: RunConfig, model_path: str, seed: int) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs.

    Args:
        config: the whole run; the sections model, rollout and weights matter.
        model_path: folder or Hugging Face name.
        seed: of the engine's sampling; give each engine its own.
    """
    model, rollout = config.model, config.rollout
    return {
        "model": model_path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "seed": seed,
        # Token ids go in and come out: the engine needs no tokenizer, and without one it starts faster. It then knows no
        # end-of-sequence token either; every request names its stop tokens.
        "skip_tokenizer_init": True,
        # The model's generation_config.json would set top_k, a repetition penalty and the like behind our back.
        "generation_config": "vllm",
        # Behaviour log-probabilities are those of the distribution that was sampled: after temperature and top_p.
        "logprobs_mode": "processed_logprobs",
        "block_size": rollout.block_size,
        "enable_prefix_caching": True,
        "max_num_seqs": rollout.max_sequences,
        # Where not all requests fit, older groups go first: they come to an end, and their prefixes are still cached.
        "scheduling_policy": "priority",
        "tensor_parallel_size": rollout.tensor_parallel,
        "weight_transfer_config": {"backend": "nccl" if config.weights.kind == "nccl" else WEIGHT_BACKEND},
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **(_gpu_args(config) if on_gpu(config) else _cpu_args(config)),
    }


def engine_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables that the engine's parent must have before it imports torch or vllm; its children inherit them."""
    common = {
        # Its warnings are about choices that are made on purpose here; the user's own setting wins.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, int(config.rollout.start_timeout))),
    }
    if on_gpu(config):
        return common
    return {
        **common,
        **({"TORCHDYNAMO_DISABLE": "1"} if config.rollout.enforce_eager else {}),
        # Without this vLLM replaces `uni` by `mp` on CPU, in order to set OMP variables that are set below anyway.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max(1, int(config.rollout.cpus_per_actor))),
        # Binding threads to cores would put two engines, or an engine and the learner, on the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def prepare_environment(config: RunConfig) -> None:
    """Make this process ready to import torch and vllm and to start an engine whose processes die with it."""
    os.environ.update(engine_environment(config))
    # Where the user's shell sets it, it would override kv_cache_memory_bytes; no value of it means "unset".
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ[OWNER_PID] = str(os.getpid())


def shutdown_seconds(config: RunConfig) -> float:
    """How long an engine's process may take to end by itself before it is killed."""
    # On CPU it gives back its semaphores at once and then only collects garbage; on GPUs it ends its communicators.
    return 10.0 if on_gpu(config) else 2.0


def on_gpu(config: RunConfig) -> bool:
    """Whether the rollout engines run on GPUs."""
    return config.rollout.gpus_per_actor > 0


def probe_tolerance(config: RunConfig) -> float:
    """Largest difference of a log-probability, in nats, with which an engine still proves its weights."""
    if config.weights.probe_tolerance is not None:
        return config.weights.probe_tolerance
    if config.model.dtype != "float32":
        return _HALF_TOLERANCE
    return _GPU_TOLERANCE if on_gpu(config) else _CPU_TOLERANCE


def _cpu_args(config: RunConfig) -> dict[str, Any]:
    rollout = config.rollout
    return {
        # Compilation needs a C++ compiler and minutes; eager float32 agrees with the learner to 1e-6.
        "enforce_eager": True if rollout.enforce_eager is None else rollout.enforce_eager,
        # In vLLM's engine process itself: one process per engine instead of two (see also the environment).
        "distributed_executor_backend": "uni",
        # An explicit size also skips the demand for most of the machine's memory, and the warm-up that measures it.
        "kv_cache_memory_bytes": int((rollout.kv_cache_gib or _CPU_KV_CACHE_GIB) * _GIB),
    }


def _gpu_args(config: RunConfig) -> dict[str, Any]:
    rollout = config.rollout
    args: dict[str, Any] = {
        "enforce_eager": bool(rollout.enforce_eager),
        # The actor holds all GPUs of its engine on one node, so plain processes below it suffice; the `ray` backend would
        # ask Ray for the same GPUs a second time and wait for ever.
        "distributed_executor_backend": "mp" if rollout.tensor_parallel > 1 else "uni",
        # vLLM counts in whole GPUs; of a part of one it may take as much of that part.
        "gpu_memory_utilization": rollout.gpu_memory_share * min(1.0, rollout.gpus_per_actor),
    }
    if rollout.kv_cache_gib is not None:
        args["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * _GIB)
    return args
