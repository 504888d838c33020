"""Samples as padded tensors, the totals of a minibatch, and quantities per token that all ranks know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.distributed import sum_over_ranks
from learner.losses import LossTotals
from learner.packing import FILLER, pack
from ray_rl.types import Microbatch, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBatch:
    """The sequences of one forward pass, padded on the right to L tokens; target t of [L - 1] is token t + 1."""

    input_ids: Tensor
    """[B, L] int64"""
    attention_mask: Tensor
    """[B, L] int64, 1 on tokens; the first column is 1 on filler rows too."""
    loss_mask: Tensor
    """[B, L - 1] bool"""
    advantages: Tensor
    """[B, L - 1] float32"""
    behavior_logprobs: Tensor
    """[B, L - 1] float32"""
    weights: Tensor
    """[B, L - 1] float32, zero outside the loss mask."""


def loss_totals(samples: Sequence[TrainingSample], *, max_tokens: int) -> LossTotals:
    """Of a whole minibatch.

    Args:
        samples: all of the minibatch, whichever rank works on them.
        max_tokens: longest completion the run allows.
    """
    sums = [(math.fsum(sample.weights), sample.loss_tokens) for sample in samples if sample.loss_tokens]
    return LossTotals(
        tokens=math.fsum(weight for weight, _ in sums),
        sequences=math.fsum(weight / tokens for weight, tokens in sums),
        max_tokens=max_tokens,
    )


def tensor_batch(samples: Sequence[TrainingSample], microbatch: Microbatch, device: torch.device) -> TensorBatch:
    """The microbatch's rows of `samples`; a filler row has no loss tokens and attends to its first position alone."""
    rows = [_FILLER_SAMPLE if index == FILLER else samples[index] for index in microbatch.indices]
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    attention_mask = (torch.arange(int(lengths.max())).unsqueeze(0) < lengths.unsqueeze(1)).long()
    return TensorBatch(
        input_ids=_padded([row.token_ids for row in rows], torch.int64).to(device),
        attention_mask=attention_mask.to(device),
        loss_mask=_padded([row.loss_mask for row in rows], torch.bool)[:, 1:].to(device),
        advantages=_padded([row.advantages for row in rows], torch.float32)[:, 1:].to(device),
        behavior_logprobs=_padded([row.behavior_logprobs for row in rows], torch.float32)[:, 1:].to(device),
        weights=_padded([row.weights for row in rows], torch.float32)[:, 1:].to(device),
    )


_FILLER_SAMPLE = TrainingSample(
    token_ids=(0, 0),
    loss_mask=(False, False),
    behavior_logprobs=(0.0, 0.0),
    advantages=(0.0, 0.0),
    weights=(0.0, 0.0),
)


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


class TokenTable:
    """One float32 per target token of each sample, on all ranks; made once per step, read by any minibatch."""

    def __init__(self, samples: Sequence[TrainingSample], device: torch.device) -> None:
        lengths = [len(sample.token_ids) - 1 for sample in samples]
        self._starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        self._values = torch.zeros(self._starts[-1], device=device)

    def fill(
        self,
        samples: Sequence[TrainingSample],
        compute: Callable[[TensorBatch], Tensor],
        *,
        rank: int,
        world_size: int,
        microbatch_size: int,
    ) -> None:
        """Compute a share of the samples on each rank ([B, L - 1] for each microbatch) and exchange the results."""
        lengths = [len(sample.token_ids) for sample in samples]
        for microbatch in pack(lengths, ranks=world_size, microbatch_size=microbatch_size)[rank]:
            rows = compute(tensor_batch(samples, microbatch, self._values.device))
            for index, row in zip(microbatch.indices, rows, strict=True):
                if index != FILLER:
                    target = self._row(index)
                    target.copy_(row[: len(target)])
        sum_over_ranks(self._values)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[B, L - 1] of these samples, padded with zeros on the right; a filler row is one zero."""
        parts = [self._values.new_zeros(1) if index == FILLER else self._row(index) for index in indices]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def _row(self, index: int) -> Tensor:
        return self._values[self._starts[index] : self._starts[index + 1]]
