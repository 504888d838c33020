from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from learner.packing import pack, split_minibatches

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
