"""LearnerConfig -> DeepSpeed's configuration, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray_rl.config.learner import LearnerConfig, OptimizerConfig
from ray_rl.config.model import Dtype


def deepspeed_config(config: LearnerConfig, dtype: Dtype) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict; `config.deepspeed` is merged over it, key by key at every depth.

    Gradients accumulate over however many microbatches a minibatch has and are reduced in `step()` (unmanaged
    accumulation). torch's AdamW needs no compiler. In bfloat16 and float16 master weights and optimizer state are
    float32, and stage 0 runs as stage 1: DeepSpeed 0.19's wrapper for unsharded 16-bit training divides gradients by a
    loss scale that it never multiplied the loss with, so that AdamW's eps swallows them.
    """
    optimizer = config.optimizer
    stage = config.zero_stage if dtype == "float32" else max(config.zero_stage, 1)
    ours: dict[str, Any] = {
        # Only DeepSpeed's own timers would read it: how many sequences a microbatch holds varies.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.grad_clip,
        "steps_per_print": None,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": stage, **(_OFFLOAD if config.offload_optimizer else {})},
        # Offloaded, torch's AdamW updates as well; DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        **_NUMBER_FORMATS[dtype],
    }
    return merge(ours, config.deepspeed)


_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
_NUMBER_FORMATS: Mapping[str, dict[str, Any]] = {
    "float32": {},
    # Gradients of many microbatches, each added in bfloat16, would lose a percent.
    "bfloat16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "float16": {"fp16": {"enabled": True}},
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which `over` wins; mappings on both sides are merged, anything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def learning_rate_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Optimizer step (0 is the first) -> factor of the learning rate.

    Warm-up over w = round(warmup_share * total) steps: (step + 1) / w, so that no step is wasted at 0 and step w - 1
    has the full rate. Then, with p = (step - w) / (total - w): 1 (constant), 1 - p (linear) or (1 + cos(pi p)) / 2
    (cosine), which would reach 0 one step after the last.

    Args:
        config: warm-up share and schedule.
        total_steps: optimizer steps of the whole run.
    """
    warmup = round(config.warmup_share * total_steps)
    decay = _SCHEDULES[config.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return decay(min((step - warmup) / max(total_steps - warmup, 1), 1.0))

    return factor


_SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
