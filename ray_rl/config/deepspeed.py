"""A user's own DeepSpeed configuration: read from a file, freed of what is left to us, and held against the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_rl.config.run import RunConfig

AUTO = "auto"
"""By which configurations for other trainers leave a value to the trainer."""


def read(path: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    try:
        found = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of a DeepSpeed JSON") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, where DeepSpeed takes an object")
    return found


def without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the values that are "auto", at any depth."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != AUTO
    }


def contradictions(config: RunConfig) -> Iterator[str]:
    """Settings of `learner.deepspeed` that say something else than the recipe's own options, each with its mend."""
    learner, given = config.learner, config.learner.deepspeed
    optimizer = learner.optimizer
    ours: dict[tuple[str, ...], tuple[Any, str]] = {
        ("zero_optimization", "stage"): (learner.zero_stage, "learner.zero_stage"),
        ("gradient_clipping",): (optimizer.grad_clip, "learner.optimizer.grad_clip"),
        ("bf16", "enabled"): (config.model.dtype == "bfloat16", "model.dtype"),
        ("fp16", "enabled"): (config.model.dtype == "float16", "model.dtype"),
        ("optimizer", "params", "lr"): (optimizer.lr, "learner.optimizer.lr"),
        ("optimizer", "params", "betas"): (list(optimizer.betas), "learner.optimizer.betas"),
        ("optimizer", "params", "eps"): (optimizer.eps, "learner.optimizer.eps"),
        ("optimizer", "params", "weight_decay"): (optimizer.weight_decay, "learner.optimizer.weight_decay"),
    }
    for path, (value, option) in ours.items():
        found = _at(given, path)
        if found is not None and found != value:
            yield (
                f"learner.deepspeed.{'.'.join(path)}: {json.dumps(found)}, but {option} makes it {json.dumps(value)}; "
                f"set {option} and leave it out here"
            )
    for key, mend in _FIXED.items():
        if key in given:
            yield f"learner.deepspeed.{key}: is decided elsewhere; leave it out and use {mend}"
    if "scheduler" in given and (optimizer.schedule != "constant" or optimizer.warmup_share):
        yield (
            "learner.deepspeed.scheduler: and learner.optimizer's schedule or warmup_share are two schedules; leave one out"
        )


_FIXED = {
    "train_batch_size": "learner.minibatch_size",
    "train_micro_batch_size_per_gpu": "learner.microbatch_tokens",
    "gradient_accumulation_steps": "learner.minibatch_size and learner.microbatch_tokens",
    "managed_gradient_accumulation": "learner.minibatch_size and learner.microbatch_tokens",
}


def _at(settings: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(settings, Mapping) or key not in settings:
            return None
        settings = settings[key]
    return settings
