import math
from collections import Counter
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from learner.packing import common_prefix, pack, pack_sharing, split_minibatches

lengths_of = st.lists(st.integers(2, 200), min_size=1, max_size=60)


def split(completions, size, seed, continuations=0):
    """Completions come first in the batch."""
    return split_minibatches([False] * completions + [True] * continuations, size, seed)


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 300))
def test_minibatches_hold_every_sample_once_and_are_nearly_equal(count, size, seed, continuations):
    parts = split(count, size, seed, continuations)
    assert sorted(index for part in parts for index in part) == list(range(count + continuations))
    for kind in (range(count), range(count, count + continuations)):
        sizes = [len(set(part) & set(kind)) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert max(len(set(part) & set(range(count))) for part in parts) <= size


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 300))
def test_continuations_change_neither_number_nor_completions_of_minibatches(count, size, seed, continuations):
    parts = split(count, size, seed, continuations)
    assert len(parts) == -(-count // size)
    assert [[index for index in part if index < count] for part in parts] == split(count, size, seed)


def test_minibatches_follow_their_seed():
    assert split(50, 10, 1, 30) == split(50, 10, 1, 30)
    assert split(50, 10, 1) != split(50, 10, 2)


@given(lengths_of, st.integers(1, 6), st.integers(1, 400))
def test_packing_places_every_sample_exactly_once(lengths, ranks, tokens):
    rows = [i for share in pack(lengths, ranks=ranks, microbatch_tokens=tokens) for m in share for i in m.indices]
    assert Counter(rows) == Counter(range(len(lengths)))


@given(lengths_of, st.integers(1, 6), st.integers(1, 400))
def test_every_rank_runs_the_same_number_of_microbatches_within_their_tokens(lengths, ranks, tokens):
    shares = pack(lengths, ranks=ranks, microbatch_tokens=tokens)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert all(len(m.indices) <= 1 or sum(lengths[i] for i in m.indices) <= tokens for share in shares for m in share)


@given(lengths_of, st.integers(1, 6), st.integers(200, 400))
def test_microbatches_are_more_than_half_full_on_average(lengths, ranks, tokens):
    """First fit leaves no two half-empty ones."""
    shares = pack(lengths, ranks=ranks, microbatch_tokens=tokens)
    for share in shares:
        used = [sum(lengths[i] for i in m.indices) for m in share if m.indices]
        assert len(used) < 2 or sum(used) > len(used) * tokens / 2


@given(lengths_of, st.integers(2, 6), st.integers(1, 400))
def test_ranks_differ_by_at_most_one_longest_sequence(lengths, ranks, tokens):
    shares = pack(lengths, ranks=ranks, microbatch_tokens=tokens)
    loads = [sum(lengths[i] for m in share for i in m.indices) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_balance_by_hand():
    # Longest first to the lightest rank: 9 -> 0, 7 -> 1, 6 -> 1, 5 -> 0, 2 -> 1 (13 against 14), into what has room of 11.
    shares = pack([5, 9, 7, 2, 6], ranks=2, microbatch_tokens=11)
    assert [[m.indices for m in share] for share in shares] == [[(1,), (0,)], [(2, 3), (4,)]]


def test_a_sequence_longer_than_a_microbatch_has_its_own_and_other_ranks_an_empty_one():
    shares = pack([20, 3, 4, 3], ranks=2, microbatch_tokens=8)
    assert [[m.indices for m in share] for share in shares] == [[(0,), ()], [(2, 1), (3,)]]


# Few different tokens, so that many rows start alike.
rows_of = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), max_size=40)


def shared_size(rows, indices):
    """Distinct prefixes: the tokens of a microbatch, common ones counted once."""
    return len({rows[i][:end] for i in indices for end in range(1, len(rows[i]) + 1)})


@given(rows_of, st.integers(1, 4), st.integers(1, 60))
def test_packing_with_shared_prefixes_keeps_every_sample_and_the_limit(rows, ranks, tokens):
    shares = pack_sharing(rows, ranks=ranks, microbatch_tokens=tokens)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert Counter(i for share in shares for m in share for i in m.indices) == Counter(range(len(rows)))
    assert all(len(m.indices) <= 1 or shared_size(rows, m.indices) <= tokens for share in shares for m in share)


@given(rows_of, st.integers(1, 3), st.integers(12, 60))
def test_the_largest_microbatch_is_as_small_as_cuts_of_the_order_allow(rows, ranks, tokens):
    shares = pack_sharing(rows, ranks=ranks, microbatch_tokens=tokens)
    largest = max((shared_size(rows, m.indices) for share in shares for m in share), default=0)
    order, count = sorted(range(len(rows)), key=rows.__getitem__), sum(len(share) for share in shares)

    def size(part):
        places = len(part) * max(len(rows[i]) for i in part)
        return shared_size(rows, part) if len(part) == 1 or places <= 4 * tokens else math.inf

    @cache
    def best(start, parts):
        """Size of the largest part when the rest of the order is cut into so many."""
        if start == len(order) or parts == 0:
            return 0 if start == len(order) else math.inf
        ends = range(start + 1, len(order) + 1)
        return min(max(size(order[start:end]), best(end, parts - 1)) for end in ends)

    assert largest == best(0, count)


def test_ranks_share_a_long_common_prefix_evenly():
    rows = [(0,) * 900 + (i,) * 100 for i in range(1, 41)]
    shares = pack_sharing(rows, ranks=4, microbatch_tokens=8192)
    assert [[shared_size(rows, m.indices) for m in share] for share in shares] == [[1900]] * 4


def test_attention_lays_no_more_than_four_times_the_tokens_side_by_side():
    rows = [(1,) * 10] * 100  # ten tokens, if all are one
    (share,) = pack_sharing(rows, ranks=1, microbatch_tokens=50)
    assert [len(m.indices) for m in share] == [20] * 5


def test_a_group_stays_together_and_costs_its_prompt_once():
    prompts = [(1,) * 50, (2,) * 50]
    rows = [prompts[i % 2] + (3 + i,) * 10 for i in range(8)]
    (share,) = pack_sharing(rows, ranks=1, microbatch_tokens=90)
    assert sorted(sorted(m.indices) for m in share) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [shared_size(rows, m.indices) for m in share] == [90, 90]


@given(st.lists(st.integers(0, 1)).map(tuple), st.lists(st.integers(0, 1)).map(tuple))
def test_a_common_prefix_is_the_longest(left, right):
    common = common_prefix(left, right)
    assert left[:common] == right[:common]
    assert common == min(len(left), len(right)) or left[common] != right[common]
