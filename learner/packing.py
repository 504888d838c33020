"""A batch of samples -> minibatches -> microbatches, balanced over data-parallel ranks by token count (pure)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ray_rl.types import Microbatch

FILLER = -1
"""Index of an empty row."""


def split_minibatches(is_continuation: Sequence[bool], minibatch_size: int, seed: int) -> list[list[int]]:
    """Seeded permutations of the completions and of the continuations, each cut into parts of nearly equal size.

    There are ceil(completions / minibatch_size) parts, so that continuations change neither the number of optimizer
    steps nor the completions of any. When minibatch_size does not divide the completions (groups were dropped), the
    parts differ by at most one of them: no optimizer step rests on a small remainder.

    Args:
        is_continuation: for each sample of the batch.
        minibatch_size: most completions of one optimizer step, over all ranks.
        seed: of the permutations; the same on all ranks.

    Returns:
        Indices of the batch's samples, each in exactly one part.
    """
    completions = [index for index, continued in enumerate(is_continuation) if not continued]
    continuations = [index for index, continued in enumerate(is_continuation) if continued]
    shuffle = random.Random(seed).shuffle
    shuffle(completions)
    shuffle(continuations)
    parts = max(1, -(-len(completions) // minibatch_size))
    halves = zip(_cut_evenly(completions, parts), _cut_evenly(continuations, parts), strict=True)
    return [first + second for first, second in halves]


def pack(lengths: Sequence[int], *, ranks: int, microbatch_size: int) -> list[list[Microbatch]]:
    """Share the sequences of one minibatch among ranks and cut each share into microbatches.

    The longest sequence not yet placed goes to the rank with the fewest tokens that still has room (LPT rule). Within
    a rank, neighbours in length share a microbatch, which keeps the padding small, and the k-th microbatches of all
    ranks are of similar length, which keeps the ranks in step.

    Args:
        lengths: tokens of each sequence of the minibatch.
        ranks: data-parallel ranks.
        microbatch_size: most sequences of one forward pass.

    Returns:
        For each rank its microbatches, the same number on every rank. A rank with too few sequences gets microbatches
        of one filler row.
    """
    per_rank = -(-len(lengths) // (ranks * microbatch_size))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_ranks = (rank for rank in range(ranks) if len(shares[rank]) < per_rank * microbatch_size)
        lightest = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        shares[lightest].append(index)
        tokens[lightest] += lengths[index]
    return [[Microbatch(indices=tuple(part) or (FILLER,)) for part in _cut_evenly(share, per_rank)] for share in shares]


def _cut_evenly(items: list[int], parts: int) -> list[list[int]]:
    """Adjoining parts whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(len(items), parts) if parts else (0, 0)
    ends = [size * (k + 1) + min(k + 1, larger) for k in range(parts)]
    return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]
