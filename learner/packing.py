"""A batch of samples -> minibatches -> microbatches, balanced over data-parallel ranks by token count (pure)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

from ray_rl.types import Microbatch


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


def pack(lengths: Sequence[int], *, ranks: int, microbatch_tokens: int) -> list[list[Microbatch]]:
    """Share the sequences of one minibatch among ranks and fill each rank's into as few microbatches as may be.

    The longest sequence not yet placed goes to the rank with the fewest tokens (LPT rule), and there into the first
    microbatch that has room for it (first fit decreasing). A sequence longer than a microbatch has one of its own.

    Args:
        lengths: tokens of each sequence of the minibatch.
        ranks: data-parallel ranks.
        microbatch_tokens: most tokens of one forward pass, but for a longer sequence.

    Returns:
        For each rank its microbatches, the same number on every rank: those with fewer get empty ones. The k-th of all
        ranks are of similar size, the fullest first, which keeps the ranks in step.
    """
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        tokens[rank] += lengths[index]
        bins = room[rank]
        place = next((k for k, left in enumerate(bins) if lengths[index] <= left), len(bins))
        if place == len(bins):
            bins.append(microbatch_tokens)
            shares[rank].append([])
        bins[place] -= lengths[index]
        shares[rank][place].append(index)
    most = max(len(share) for share in shares)
    packed = []
    for share, bins in zip(shares, room, strict=True):
        fullest_first = [indices for _, indices in sorted(zip(bins, share, strict=True))]
        padded = fullest_first + [[]] * (most - len(share))
        packed.append([Microbatch(indices=tuple(indices)) for indices in padded])
    return packed


def pack_sharing(rows: Sequence[tuple[int, ...]], *, ranks: int, microbatch_tokens: int) -> list[list[Microbatch]]:
    """As `pack`, for a model that computes tokens once with which several sequences of a microbatch start.

    In alphabetical order those that start alike adjoin; the order is cut where microbatches become nearly equal.

    Args:
        rows: token ids of each sequence.
        ranks: data-parallel ranks.
        microbatch_tokens: most tokens of one forward pass, shared ones counted once; but for a longer sequence.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    # Of each, what the one before it does not start with.
    own = [len(rows[i]) - common_prefix(rows[before], rows[i]) for before, i in pairwise(order)]
    left = sum(own, len(rows[order[0]]) if order else 0)
    count = ranks * max(1, math.ceil(left / (ranks * microbatch_tokens)))
    parts: list[list[int]] = []
    sizes: list[int] = []
    for index, tokens in zip(order, [microbatch_tokens + 1, *own], strict=False):
        size = sizes[-1] if parts else 0
        # What is open and what is left, shared among the parts that are still to come.
        target = (size + left) / max(count - len(parts) + 1, 1)
        if size + tokens > microbatch_tokens or (len(parts) < count and size + tokens / 2 > target):
            parts.append([])
            sizes.append(0)
            tokens = len(rows[index])
        parts[-1].append(index)
        sizes[-1] += tokens
        left -= tokens
    most = -(-len(parts) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for part in sorted(range(len(parts)), key=lambda part: (-sizes[part], part)):
        open_ranks = (rank for rank in range(ranks) if len(shares[rank]) < most)
        shares[min(open_ranks, key=lambda rank: (sum(sizes[k] for k in shares[rank]), rank))].append(part)
    return [
        [Microbatch(indices=tuple(parts[part])) for part in share] + [Microbatch(indices=())] * (most - len(share))
        for share in shares
    ]


def common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Number of tokens with which both start."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cut_evenly(items: list[int], parts: int) -> list[list[int]]:
    """Adjoining parts whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(len(items), parts) if parts else (0, 0)
    ends = [size * (k + 1) + min(k + 1, larger) for k in range(parts)]
    return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]
