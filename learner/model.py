"""The policy as a transformers model, and the log-probabilities of given tokens under it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ray_rl.config.model import ModelConfig


def load_model(config: ModelConfig, path: str | os.PathLike[str], *, trainable: bool = True) -> nn.Module:
    """A causal language model on the CPU, without dropout, in `config.dtype`.

    Dropout is off because the policy's log-probabilities must be a function of its weights: with it, the policy would
    differ from itself at the start of a step.

    Args:
        config: number format, attention, revision, trust.
        path: a local folder or a Hugging Face name.
        trainable: False freezes the parameters.

    Raises:
        OSError: no such model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attention,
        revision=config.revision or "main",
        trust_remote_code=config.trust_remote_code,
    )
    _disable_dropout(model)
    if not trainable:
        return model.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the embedding that the tokenizer may use."""
    return int(model.config.get_text_config().vocab_size)


def token_logprobs_and_entropy(
    model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens 1..L-1 given those before them, and the entropy of the distributions they came from.

    Args:
        model: returns an object with `logits` [B, L, V].
        input_ids: [B, L], padded on the right.
        attention_mask: [B, L], 1 on tokens, 0 on padding.
        temperature: logits are divided by it.

    Returns:
        Log-probabilities (natural log, with gradient) and entropies (nats, without), both [B, L - 1] in float32. What
        stands at padding has no meaning.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
    if temperature != 1.0:
        logits = logits / temperature
    normalizer = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen - normalizer, _entropy(logits.detach(), normalizer.detach())


@torch.no_grad()
def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    """-sum p log p for [B, L, V] logits, sequence by sequence so that only a few [L, V] live at a time."""
    entropies = []
    for of_sequence, log_z in zip(logits, normalizer, strict=True):
        probabilities = torch.exp(of_sequence - log_z.unsqueeze(-1))
        entropies.append(torch.special.entr(probabilities).sum(dim=-1))
    return torch.stack(entropies)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], *, sharded: bool) -> Iterator[None]:
    """Whole parameters within the block; a collective that every rank must enter when `sharded` (ZeRO-3)."""
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield
