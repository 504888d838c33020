"""A batch of samples -> minibatches -> microbatches, balanced over data-parallel ranks by token count (pure)."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ray_rl.types import Microbatch

_MOST_PLACES = 4
"""Times microbatch_tokens that attention may lay side by side: what it keeps for the backward pass must have a bound, too."""


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

    In alphabetical order those that start alike adjoin. That order is cut into as few microbatches as may be, the largest
    of them as small as may be; a cut within a common prefix costs it once more.

    Args:
        rows: token ids of each sequence.
        ranks: data-parallel ranks.
        microbatch_tokens: most tokens of one forward pass, shared ones counted once, but for a longer sequence. Attention
            lays the sequences side by side, as long as the longest: together at most 4 times as many places.

    Returns:
        For each rank its microbatches, the same number on every rank: those with fewer get empty ones. The k-th of all
        ranks are of similar size, the fullest first.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    # Of each row what the one before it does not start with.
    own = {i: len(rows[i]) - common_prefix(rows[before], rows[i]) for before, i in pairwise(order)}
    most = -(-len(_cut(rows, order, own, microbatch_tokens, microbatch_tokens)) // ranks)
    sizes = range(1, microbatch_tokens + 1)
    smallest = bisect_left(sizes, -most * ranks, key=lambda size: -len(_cut(rows, order, own, size, microbatch_tokens)))
    parts = sorted(_cut(rows, order, own, sizes[smallest], microbatch_tokens), reverse=True)
    shares: list[list[Microbatch]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for size, indices in parts:
        rank = min((rank for rank in range(ranks) if len(shares[rank]) < most), key=lambda rank: (tokens[rank], rank))
        tokens[rank] += size
        shares[rank].append(Microbatch(indices=tuple(indices)))
    return [share + [Microbatch(indices=())] * (most - len(share)) for share in shares]


def _cut(
    rows: Sequence[tuple[int, ...]], order: Sequence[int], own: Mapping[int, int], size: int, microbatch_tokens: int
) -> list[tuple[int, list[int]]]:
    """Tokens and rows of each part, when as many rows of the order as fit go into a part of `size` tokens."""
    parts: list[list[int]] = []
    tokens: list[int] = []
    longest = 0
    for index in order:
        length = len(rows[index])
        widest = max(longest, length)
        if (
            parts
            and tokens[-1] + own[index] <= size
            and (len(parts[-1]) + 1) * widest <= _MOST_PLACES * microbatch_tokens
        ):
            parts[-1].append(index)
            tokens[-1] += own[index]
            longest = widest
        else:
            parts.append([index])
            tokens.append(length)
            longest = length
    return list(zip(tokens, parts, strict=True))


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
