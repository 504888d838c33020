"""Attention over packed sequences, for transformers' models: PyTorch's fused kernel, and no pair of two sequences.

A row of packed sequences needs a mask that keeps them apart, and with a mask the kernel computes all T x T pairs of the
row to throw most away. Here the sequences are laid side by side instead, padded to the longest, for attention alone: the
kernel is causal and needs no mask, and everything else in the model stays without padding. Tokens that several sequences
start with are laid in each of them, while everything else in the model computes them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learner.batches import PackedSequences

PACKED_SDPA = "packed_sdpa"
"""Name under which transformers knows `packed_sdpa`."""


def register() -> None:
    """Tell transformers of it."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: PackedSequences,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        module: the layer's attention.
        query: [1, heads, T, size]
        key: [1, key heads, T, size]
        value: as key.
        attention_mask: none, since the sequences' lengths say it all.
        sequences: the row of T tokens.
        scaling: of the scores; None: 1 / sqrt(size).
        dropout: must be 0.
        sliding_window: how many tokens back a token sees, itself included; None: all.
        softcap: must be None.
        kwargs: what other implementations take.

    Returns:
        [1, T, heads, size], and no weights.

    Raises:
        NotImplementedError: the model caps its scores, which the fused kernel can't.
    """
    if softcap is not None:
        raise NotImplementedError("this model caps its attention scores: use model.attention=eager")
    count, longest = sequences.places.shape

    def spread(row: Tensor, shared: tuple[tuple[int, int, int], ...]) -> Tensor:
        block = _Spread.apply(row[0].transpose(0, 1), sequences.places.flatten(), sequences.owned, shared)
        return block.view(count, longest, *block.shape[1:]).transpose(1, 2)

    mask = None
    if sliding_window is not None and longest > sliding_window:
        distance = torch.arange(longest, device=query.device)
        distance = distance.unsqueeze(1) - distance
        mask = (distance >= 0) & (distance < sliding_window)
    output = F.scaled_dot_product_attention(
        # Of a shared token's attention the owner's is used, so its query has the owner's gradient alone.
        spread(query, ()),
        spread(key, sequences.shared),
        spread(value, sequences.shared),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    block = output.transpose(1, 2).reshape(count * longest, *output.shape[1::2])
    return _Gather.apply(block, sequences.owned).unsqueeze(0), None


class _Spread(torch.autograd.Function):
    """A row's tokens to each place of a block. PyTorch's own gradients of indexing add up, one token after the other."""

    @staticmethod
    def forward(
        ctx: Any, row: Tensor, places: Tensor, owned: Tensor, shared: tuple[tuple[int, int, int], ...]
    ) -> Tensor:
        ctx.save_for_backward(owned)
        ctx.shared = shared
        return row.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (owned,) = ctx.saved_tensors
        block = gradients[0]
        row = block.index_select(0, owned)
        if ctx.shared:
            row = row.float()  # many small ones would be lost in 16 bits
            for first, place, length in ctx.shared:
                row[first : first + length] += block[place : place + length]
        return row.to(block.dtype), None, None, None


class _Gather(torch.autograd.Function):
    """The inverse: a block's tokens at the places that own them."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, owned: Tensor) -> Tensor:
        ctx.save_for_backward(owned)
        ctx.size = len(block)
        return block.index_select(0, owned)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (owned,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, owned, gradient), None
