"""Samples as one packed row of tokens, the totals of a minibatch, and quantities per loss token that all ranks know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from learner.distributed import sum_over_ranks
from learner.losses import LossTokens, LossTotals
from learner.packing import common_prefix
from ray_rl.types import Microbatch, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequences:
    """S sequences in one row of T tokens, without padding; a token attends to its own sequence alone.

    They lie end to end; but where prefixes are shared, tokens with which a sequence and the one before it start are in the
    row once, and the row is a tree.
    """

    input_ids: Tensor
    """[1, T] int64"""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    starts: Tensor
    """[S + 1] int32: offsets in the row at which the sequences' own tokens start, and T: without sharing, their ends."""
    longest: int
    """Tokens of the longest sequence."""
    places: Tensor
    """[S, longest] int64: where in the row each sequence's tokens are; 0 past its end, where nothing causal looks."""
    owned: Tensor
    """[T] int64: for each token of the row, its index in the flattened places, as of the sequence whose own it is."""
    shared: tuple[tuple[int, int, int], ...]
    """Runs of tokens that a sequence shares: first index in the row, first in the flattened places, length."""


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


def pack_sequences(rows: Sequence[tuple[int, ...]], device: torch.device, *, share: bool = False) -> PackedSequences:
    """Of token ids; no sequence at all becomes a single token, since models take no empty row.

    Args:
        rows: token ids.
        device: of the tensors.
        share: prefixes, of which only `learner.attention.packed_sdpa` knows.
    """
    rows = rows or [(0,)]
    longest = max(len(row) for row in rows)
    ids: list[int] = []
    depths: list[int] = []
    owned: list[int] = []
    starts: list[int] = []
    paths: list[list[int]] = []
    shared: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        common = common_prefix(rows[index - 1], row) if share and index else 0
        starts.append(len(ids))
        path = paths[-1][:common] if common else []
        shared += [(path[first], index * longest + first, count) for first, count in _runs(path)]
        path += range(len(ids), len(ids) + len(row) - common)
        paths.append(path)
        ids += row[common:]
        depths += range(common, len(row))
        owned += range(index * longest + common, index * longest + len(row))
    return PackedSequences(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([depths], device=device),
        starts=torch.tensor([*starts, len(ids)], dtype=torch.int32, device=device),
        longest=longest,
        places=torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device),
        owned=torch.tensor(owned, device=device),
        shared=tuple(shared),
    )


def _runs(path: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First index and length of each stretch of adjoining places."""
    first = 0
    for index in range(1, len(path) + 1):
        if index == len(path) or path[index] != path[index - 1] + 1:
            yield first, index - first
            first = index


def packed_batch(
    samples: Sequence[TrainingSample], microbatch: Microbatch, device: torch.device, *, share: bool = False
) -> PackedBatch:
    """The microbatch's rows of `samples`; `share` as for `pack_sequences`."""
    rows = [samples[index] for index in microbatch.indices]
    trained = [[t for t, trains in enumerate(row.loss_mask) if trains] for row in rows]

    def of_tokens(values: Callable[[TrainingSample], Sequence[float]], dtype: torch.dtype) -> Tensor:
        flat = [values(row)[t] for row, places in zip(rows, trained, strict=True) for t in places]
        return torch.tensor(flat, dtype=dtype, device=device)

    sequences = pack_sequences([row.token_ids for row in rows], device, share=share)
    before = [index * sequences.longest + t - 1 for index, places in enumerate(trained) for t in places]
    counts = torch.tensor([len(places) for places in trained], dtype=torch.int64, device=device)
    return PackedBatch(
        sequences=sequences,
        predicting=sequences.places.flatten()[torch.tensor(before, dtype=torch.int64, device=device)],
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
        microbatches: Iterable[Microbatch],
        compute: Callable[[Microbatch], Tensor],
    ) -> None:
        """Compute this rank's share of the samples ([N] for each microbatch) and exchange the results."""
        for microbatch in microbatches:
            found = compute(microbatch)
            counts = [samples[index].loss_tokens for index in microbatch.indices]
            for index, of_sample in zip(microbatch.indices, found.split(counts) if counts else (), strict=True):
                self._of(index).copy_(of_sample)
        sum_over_ranks(self._values)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[N] of these samples' loss tokens, end to end."""
        return torch.cat([self._values[:0], *(self._of(index) for index in indices)])

    def _of(self, index: int) -> Tensor:
        return self._values[self._starts[index] : self._starts[index + 1]]
