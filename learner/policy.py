"""Models handed to DeepSpeed: the policy with its optimizer and schedule, the reference without."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from learner.deepspeed_config import deepspeed_config, learning_rate_factor
from ray_rl.config.run import RunConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def initialize_policy(model: nn.Module, config: RunConfig) -> DeepSpeedEngine:
    """A DeepSpeed engine that trains the model.

    A `scheduler` in `learner.deepspeed` replaces our schedule; either is saved with DeepSpeed's checkpoints.
    """
    import deepspeed

    settings = deepspeed_config(config.learner, config.model.dtype)
    factor = learning_rate_factor(config.learner.optimizer, config.optimizer_steps)

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=settings,
        lr_scheduler=None if "scheduler" in settings else schedule,
    )
    # Without ZeRO and mixed precision nobody would tell the gradient norm: `reduce_gradients` takes the reduction over.
    engine.enable_backward_allreduce = not _is_plain(engine)
    return engine


def initialize_reference(model: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """A frozen model ready for forward passes; sharded like the policy under ZeRO-3."""
    settings = deepspeed_config(config.learner, config.model.dtype)
    if settings["zero_optimization"]["stage"] < 3:
        return model.to(device)
    import deepspeed

    kept = {key: value for key, value in settings.items() if key not in ("optimizer", "scheduler")}
    engine, *_ = deepspeed.initialize(model=model, config=kept)
    engine.eval()
    return engine


def reduce_gradients(engine: DeepSpeedEngine) -> float | None:
    """Average the gradients over the ranks and return their norm before clipping, where DeepSpeed does not tell it.

    Returns:
        None when `engine.step()` reduces the gradients and `engine.get_global_grad_norm()` tells the norm afterwards.
    """
    if not _is_plain(engine):
        return None
    if engine.dp_world_size > 1:  # of one rank it would only copy all gradients to and fro
        engine.buffered_allreduce_fallback()
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _is_plain(engine: DeepSpeedEngine) -> bool:
    """Stage 0 in float32: DeepSpeed's optimizer is torch's own."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)
