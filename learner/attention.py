"""Attention over packed sequences, for transformers' models: PyTorch's fused kernel, and no pair of two sequences.

A row of packed sequences needs a mask that keeps them apart, and with a mask the kernel computes all T x T pairs of the
row to throw most away. Here the sequences are laid side by side instead, padded to the longest, for attention alone: the
kernel is causal and needs no mask, and everything else in the model stays without padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    cu_seq_lens_q: Tensor,
    max_length_q: int,
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
        cu_seq_lens_q: [S + 1] offsets of the sequences in the row, with T.
        max_length_q: length of the longest.
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
    starts = cu_seq_lens_q.long()
    lengths = starts.diff()
    count, longest = len(lengths), max_length_q
    # Where the row's tokens lie in the padded block.
    shifts = torch.arange(count, device=starts.device) * longest - starts[:-1]
    tokens = query.shape[2]  # told, so that a GPU is not waited for in every layer
    places = torch.arange(tokens, device=starts.device) + shifts.repeat_interleave(lengths, output_size=tokens)

    def spread(row: Tensor) -> Tensor:
        block = _Spread.apply(row[0].transpose(0, 1), places, count * longest)
        return block.view(count, longest, *block.shape[1:]).transpose(1, 2)

    mask = None
    if sliding_window is not None and longest > sliding_window:
        distance = torch.arange(longest, device=starts.device)
        distance = distance.unsqueeze(1) - distance
        mask = (distance >= 0) & (distance < sliding_window)
    output = F.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return _Gather.apply(output.transpose(1, 2).reshape(count * longest, *output.shape[1::2]), places).unsqueeze(
        0
    ), None


class _Spread(torch.autograd.Function):
    """Rows to their places in a block of zeros. PyTorch's own gradients of indexing add up, one row after the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """The inverse: a block's rows at the places."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(block)
        return block.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None
