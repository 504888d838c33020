"""The policy as a transformers model, and the log-probabilities of given tokens under it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.attention import PACKED_SDPA, register
from learner.batches import PackedSequences, pack_sequences
from ray_rl.config.model import ModelConfig
from ray_rl.errors import ConfigError
from ray_rl.wording import one_line

_CHUNK_FLOATS, _CHUNK_ROWS = 2**23, 512
"""Logits that live at a time: 32 MiB in float32, and a few times that in passing; but rows enough to keep the hardware busy."""


def load_model(config: ModelConfig, path: str | os.PathLike[str], *, trainable: bool = True) -> nn.Module:
    """A causal language model on the CPU, without dropout, in `config.dtype`.

    Dropout is off because the policy's log-probabilities must be a function of its weights: with it, the policy would
    differ from itself at the start of a step.

    Args:
        config: number format, attention, revision, trust.
        path: a local folder or a Hugging Face name.
        trainable: False freezes the parameters.

    Raises:
        ConfigError: no such model, none that can be loaded as a causal language model, or one that lacks weights.
    """
    from transformers.utils import logging

    register()
    logging.disable_progress_bar()
    model = _loaded(config, path)
    _disable_dropout(model)
    if not trainable:
        return model.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _loaded(config: ModelConfig, path: str | os.PathLike[str]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=PACKED_SDPA if config.attention == "sdpa" else config.attention,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    # For a broken file, an unknown kind of model or other shapes than config.json says, transformers raises anything.
    except Exception as error:
        raise ConfigError(
            f"model.path: {path} is not loadable as a causal language model: {one_line(error)}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"model.path: {path} lacks {len(missing)} of the model's weights ({missing[0]}, ...), which would be random; "
            "fetch or export it again"
        )
    return model


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class Policy(nn.Module):
    """A causal language model that tells the log-probabilities of given tokens without keeping its logits.

    Logits are by far the largest tensor of language models: a vocabulary's floats per token. Here the hidden states go
    through the head a chunk of positions at a time, only those whose log-probability is asked for, and once more in the
    backward pass. What is kept is one float per token.
    """

    def __init__(self, model: nn.Module, *, recompute_head: bool = True, float32_head: bool = True) -> None:
        """Of a transformers model.

        Args:
            model: its parameters are the policy's.
            recompute_head: False keeps the logits for the backward pass: faster, for small vocabularies.
            float32_head: logits are computed in float32, whatever the format of the weights.
        """
        super().__init__()
        self.model: Any = model
        self._recompute_head = recompute_head
        self._plain_head = _head_is_plain(self.model)
        head = self.model.get_output_embeddings()
        if float32_head and head.weight.dtype != torch.float32:
            # Its call stays the module's: ZeRO-3 gathers the weight around it.
            head.forward = partial(_float32_linear, head)

    def forward(
        self, sequences: PackedSequences, predicting: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens given those before them, and the entropy of the distributions they came from.

        Args:
            sequences: T tokens.
            predicting: [N] int64: positions whose hidden states predict the targets.
            targets: [N] int64.
            temperature: logits are divided by it.

        Returns:
            Log-probabilities (natural log, with gradient) and entropies (nats, without), both [N] in float32.
        """
        if not self._plain_head:
            logits = self.model(**model_inputs(sequences), logits_to_keep=predicting).logits[0]
            return _scored(logits, targets, temperature)
        hidden = self.model.base_model(**model_inputs(sequences)).last_hidden_state[0].index_select(0, predicting)
        size = max(_CHUNK_FLOATS // vocabulary_size(self.model), _CHUNK_ROWS)
        # Without any target one empty chunk is left, through which the (empty) gradient flows to all parameters.
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        compute = partial(checkpoint, self._chunk, use_reentrant=False) if self._recompute_head else self._chunk
        found = [compute(*chunk, temperature) for chunk in chunks]
        logprobs, entropies = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return _scored(self.model.get_output_embeddings()(hidden), targets, temperature)


def model_inputs(sequences: PackedSequences) -> dict[str, Any]:
    """Of a transformers model."""
    return {
        "input_ids": sequences.input_ids,
        "position_ids": sequences.position_ids,
        "use_cache": False,
        # What transformers hands on to its attention implementations: ours, and those that know cumulative lengths, for
        # which nothing is shared.
        "sequences": sequences,
        "cu_seq_lens_q": sequences.starts,
        "cu_seq_lens_k": sequences.starts,
        "max_length_q": sequences.longest,
        "max_length_k": sequences.longest,
    }


@torch.no_grad()
def sharing_is_exact(model: Any) -> bool:
    """Whether a model computes the same where sequences share a prefix: recurrent layers and convolutions do not."""
    rows = [(0, 1, 2), (0, 1, 3)]
    shared = pack_sequences(rows, model.device, share=True)
    hidden = model.base_model(**model_inputs(shared)).last_hidden_state[0]
    tolerance = torch.finfo(hidden.dtype).eps ** 0.5
    for row, places in zip(rows, shared.places, strict=True):
        alone = model.base_model(**model_inputs(pack_sequences([row], model.device))).last_hidden_state[0]
        if not torch.allclose(hidden[places], alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
            return False
    return True


def _float32_linear(head: nn.Linear, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.float()
    return nn.functional.linear(hidden.float(), head.weight.float(), bias)


@torch.no_grad()
def _head_is_plain(model: Any) -> bool:
    """Whether the logits are what the head makes of the last hidden states: some models scale or cap them behind it."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # runs on any device
    probe = torch.tensor([[0, 1]], device=model.device)
    hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    logits = model(input_ids=probe, use_cache=False).logits
    model.set_attn_implementation(attention)
    return bool(torch.allclose(logits.float(), model.get_output_embeddings()(hidden).float(), rtol=1e-6, atol=0.0))


def _scored(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities and entropies of [N, V] logits."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return _Scores.apply(logits, targets)


class _Scores(torch.autograd.Function):
    """Log-probabilities, with the gradient 1[v = target] - p_v, and entropies; few passes over [N, V], one tensor of it kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        targets = targets.unsqueeze(-1)
        everything = torch.log_softmax(logits, dim=-1)
        probabilities = everything.exp()
        entropies = -torch.linalg.vecdot(probabilities, everything)
        ctx.save_for_backward(probabilities, targets)
        ctx.mark_non_differentiable(entropies)
        return everything.gather(-1, targets).squeeze(-1), entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        of_logprobs = gradients[0].unsqueeze(-1)
        return (probabilities * -of_logprobs).scatter_add_(-1, targets, of_logprobs), None


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the embedding that the tokenizer may use."""
    return int(model.config.get_text_config().vocab_size)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], *, sharded: bool, written_by: int | None = None) -> Iterator[None]:
    """Whole parameters within the block; a collective that every rank must enter when `sharded` (ZeRO-3).

    Args:
        parameters: of a model.
        sharded: whether each rank holds a part of them only.
        written_by: the rank whose writing within the block all ranks take over; None: they are read only.
    """
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=written_by):
        yield
