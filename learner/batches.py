"""Samples as one packed row of tokens, the totals of a minibatch, and quantities per loss token that all ranks know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from learner.distributed import sum_over_ranks
from learner.losses import LossTokens, LossTotals
from learner.packing import pack
from ray_rl.types import Microbatch, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequences:
    """Sequences end to end in one row of T tokens, without padding; none attends to another."""

    input_ids: Tensor
    """[1, T] int64"""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    starts: Tensor
    """[S + 1] int32: offsets at which the sequences start, and T."""
    longest: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The sequences of one forward pass, and what is known of their N loss tokens, sequence by sequence."""

    sequences: PackedSequences
    predicting: Tensor
    """[N] int64: the positions in the row whose hidden states predict the loss tokens."""
    targets: Tensor
    """[N] int64: the loss tokens."""
    advantages: Tensor
    """[N] float32"""
    behavior_logprobs: Tensor
    """[N] float32"""
    tokens: LossTokens


def pack_sequences(rows: Sequence[Sequence[int]], device: torch.device) -> PackedSequences:
    """Of token ids; no sequence at all becomes a single token, since models take no empty row."""
    rows = rows or [(0,)]
    lengths = [len(row) for row in rows]
    return PackedSequences(
        input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        longest=max(lengths),
    )


def packed_batch(samples: Sequence[TrainingSample], microbatch: Microbatch, device: torch.device) -> PackedBatch:
    """The microbatch's rows of `samples`."""
    rows = [samples[index] for index in microbatch.indices]
    starts = [0, *accumulate(len(row.token_ids) for row in rows)]
    trained = [[t for t, trains in enumerate(row.loss_mask) if trains] for row in rows]

    def of_tokens(values: Callable[[TrainingSample], Sequence[float]], dtype: torch.dtype) -> Tensor:
        flat = [values(row)[t] for row, places in zip(rows, trained, strict=True) for t in places]
        return torch.tensor(flat, dtype=dtype, device=device)

    predicting = [start + t - 1 for start, places in zip(starts, trained, strict=False) for t in places]
    counts = torch.tensor([len(places) for places in trained], dtype=torch.int64, device=device)
    return PackedBatch(
        sequences=pack_sequences([row.token_ids for row in rows], device),
        predicting=torch.tensor(predicting, dtype=torch.int64, device=device),
        targets=of_tokens(lambda row: row.token_ids, torch.int64),
        advantages=of_tokens(lambda row: row.advantages, torch.float32),
        behavior_logprobs=of_tokens(lambda row: row.behavior_logprobs, torch.float32),
        tokens=LossTokens(
            weights=of_tokens(lambda row: row.weights, torch.float32),
            sequence=torch.repeat_interleave(torch.arange(len(rows), device=device), counts),
            counts=counts,
        ),
    )


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


class TokenTable:
    """One float32 per loss token of each sample, on all ranks; made once per step, read by any minibatch."""

    def __init__(self, samples: Sequence[TrainingSample], device: torch.device) -> None:
        self._starts = [0, *accumulate(sample.loss_tokens for sample in samples)]
        self._values = torch.zeros(self._starts[-1], device=device)

    def fill(
        self,
        samples: Sequence[TrainingSample],
        compute: Callable[[PackedBatch], Tensor],
        *,
        rank: int,
        world_size: int,
        microbatch_tokens: int,
    ) -> None:
        """Compute a share of the samples on each rank ([N] for each microbatch) and exchange the results."""
        lengths = [len(sample.token_ids) for sample in samples]
        for microbatch in pack(lengths, ranks=world_size, microbatch_tokens=microbatch_tokens)[rank]:
            found = compute(packed_batch(samples, microbatch, self._values.device))
            counts = [samples[index].loss_tokens for index in microbatch.indices]
            for index, of_sample in zip(microbatch.indices, found.split(counts) if counts else (), strict=True):
                self._of(index).copy_(of_sample)
        sum_over_ranks(self._values)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[N] of these samples' loss tokens, end to end."""
        return torch.cat([self._values[:0], *(self._of(index) for index in indices)])

    def _of(self, index: int) -> Tensor:
        return self._values[self._starts[index] : self._starts[index + 1]]
