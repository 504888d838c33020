"""A batch of samples -> minibatches -> microbatches, balanced over data-parallel ranks by token count (pure)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ray_rl.types import Microbatch

FILLER = -1
"""Index of an empty row."""


def split_minibatches(count: int, minibatch_size: int, seed: int) -> list[list[int]]:
    """A seeded permutation of range(count), cut into ceil(count / minibatch_size) parts of nearly equal size.

    When minibatch_size does not divide count (groups were dropped), the parts differ by at most one sequence, so that
    no optimizer step rests on a small remainder.

    Args:
        count: sequences of the batch.
        minibatch_size: most sequences of one optimizer step, over all ranks.
        seed: of the permutation; the same on all ranks.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return _cut_evenly(order, -(-count // minibatch_size))


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
