"""Two policies that differ: the one that engines begin with, and the one that a learner brings them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_rl.embedded import policy_path

_HEADS = 4
_NOISE = 0.2
"""Standard deviation of what is added to a tensor, over the tensor's own: other log-probabilities by whole nats."""


def two_policies(folder: Path, model: Path | None, *, shards: int) -> tuple[Path, Path]:
    """Folders in Hugging Face format; the same arguments give the same weights.

    Args:
        folder: where those are written that do not exist yet.
        model: the first; None: the built-in policy, or where its 5 heads cannot be shared out, a random one with 4.
        shards: GPUs that share an engine.

    Returns:
        The engines' and the learner's.
    """
    if model is None:
        model = policy_path() if shards == 1 else _made(folder / "four-heads", policy_path(), _with_four_heads)
    return model, _made(folder / f"{model.name}-noisy", model, _with_noise)


def _made(target: Path, source: Path, make: Callable[[Path], PreTrainedModel]) -> Path:
    """A folder with another model and all else of the source; whole or not at all."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
        make(source).save_pretrained(partial)
        partial.rename(target)
    return target


def _with_four_heads(source: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    config.num_attention_heads = config.num_key_value_heads = _HEADS
    config.hidden_size = _HEADS * config.head_dim
    config.initializer_range = 0.15
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@torch.no_grad()
def _with_noise(source: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random) * parameter.float().std(correction=0)
        parameter += (_NOISE * noise).to(parameter.dtype)
    return model
