from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.packing import FILLER, pack, split_minibatches

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


@given(lengths_of, st.integers(1, 6), st.integers(1, 9))
def test_packing_places_every_sample_exactly_once(lengths, ranks, size):
    rows = [i for share in pack(lengths, ranks=ranks, microbatch_size=size) for m in share for i in m.indices]
    placed = Counter(row for row in rows if row != FILLER)
    assert placed == Counter(range(len(lengths)))


@given(lengths_of, st.integers(1, 6), st.integers(1, 9))
def test_every_rank_runs_the_same_number_of_microbatches_within_their_size(lengths, ranks, size):
    shares = pack(lengths, ranks=ranks, microbatch_size=size)
    assert len(shares) == ranks
    assert {len(share) for share in shares} == {-(-len(lengths) // (ranks * size))}
    assert all(1 <= len(m.indices) <= size for share in shares for m in share)


@given(lengths_of, st.integers(2, 6))
def test_ranks_differ_by_at_most_one_longest_sequence_where_room_allows(lengths, ranks):
    shares = pack(lengths, ranks=ranks, microbatch_size=len(lengths))
    loads = [sum(lengths[i] for m in share for i in m.indices if i != FILLER) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_balance_by_hand():
    # Longest first to the lightest rank: 9 -> 0, 7 -> 1, 6 -> 1, 5 -> 0, 2 -> 1 (13 against 14), full at 2 microbatches of 2.
    shares = pack([5, 9, 7, 2, 6], ranks=2, microbatch_size=2)
    assert [[m.indices for m in share] for share in shares] == [[(1,), (0,)], [(2, 4), (3,)]]


def test_a_rank_without_sequences_gets_a_filler_row():
    shares = pack([4], ranks=2, microbatch_size=8)
    assert [[m.indices for m in share] for share in shares] == [[(0,)], [(FILLER,)]]


@pytest.mark.parametrize("size", [1, 3])
def test_neighbours_in_length_share_a_microbatch(size):
    (share,) = pack([1, 100, 2, 99, 3, 98], ranks=1, microbatch_size=size)
    assert [i for m in share for i in m.indices] == [1, 3, 5, 4, 2, 0]
