"""Segments by uncertain tokens: the m-th of them ends one, and nothing that comes later has a say in it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.cutpoints import uncertain_cuts
from actors.segmentation import segment
from ray_rl.config.segmentation import CutpointsSegmentation

quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)

probabilities = st.lists(st.sampled_from((1.0, 0.95, 0.9, 0.89, 0.5, 0.01)), max_size=60)
limits = st.fixed_dictionaries(
    {
        "every": st.integers(1, 5),
        "min_tokens": st.integers(1, 4),
        "max_tokens": st.none() | st.integers(4, 9),
        "max_segments": st.none() | st.integers(1, 8),
    }
)


def bounds(sampled_with, *, ends=False, **options):
    """Boundaries of a text of one-letter tokens with these probabilities; with `ends`, the last is without text."""
    letters = len(sampled_with) - ends
    logprobs = tuple(map(math.log, sampled_with))
    starts = (*range(letters), *((letters,) if ends else ()))
    return segment(CutpointsSegmentation(**options), "x" * letters, starts, logprobs)


def test_an_example_by_hand():
    sampled_with = (0.5, 1.0, 0.89, 0.9, 0.91, 0.2, 0.7, 1.0, 0.3, 1.0)  # uncertain: 0, 2, 5, 6, 8
    assert bounds(sampled_with, every=1) == (0, 1, 3, 6, 7, 9, 10)
    assert bounds(sampled_with, every=2) == (0, 3, 7, 10)
    assert bounds(sampled_with, every=5) == (0, 9, 10)
    assert bounds(sampled_with, every=6) == (0, 10)
    assert bounds(sampled_with, every=2, threshold=0.5) == (0, 9, 10)  # uncertain: 5, 8


def test_the_defaults_are_those_of_the_paper():
    assert bounds([0.89] * 12) == (0, 5, 10, 12)
    assert bounds([0.9] * 12) == (0, 12)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.9, 1.0])
def test_a_probability_equal_to_the_threshold_is_not_uncertain(threshold):
    equal, below = math.log(threshold), math.log(threshold * (1 - 1e-9))
    assert uncertain_cuts([equal, below, equal], every=1, threshold=threshold) == [2]


@quick
@given(probabilities)
def test_at_threshold_one_each_token_that_was_not_certain_ends_a_segment(sampled_with):
    uncertain = [t for t, p in enumerate(sampled_with[:-1]) if p < 1]
    assert bounds(sampled_with, every=1, threshold=1.0)[1:-1] == tuple(t + 1 for t in uncertain)


def test_without_uncertain_tokens_the_completion_is_one_segment():
    assert bounds([0.99] * 7, every=1) == (0, 7)
    assert bounds([], every=1) == (0,)
    assert bounds([0.1], every=1) == (0, 1)


def test_an_end_of_sequence_alone_is_no_segment():
    assert bounds([0.1, 1.0, 0.1, 0.1], every=1, ends=True) == (0, 1, 4)
    assert bounds([0.1, 1.0, 0.1, 0.1], every=1, ends=False) == (0, 1, 3, 4)
    assert bounds([0.1], every=1, ends=True) == (0, 1)
    assert bounds([1.0] * 4 + [0.1], every=1, max_tokens=4, ends=True) == (0, 5)


@quick
@given(probabilities, probabilities, probabilities, limits)
def test_the_tokens_after_a_boundary_decide_nothing_of_it(head, tail, other_tail, options):
    """Up to the state after `head`, where only the end of the text is not a boundary of its own."""
    full, other, cut_off = (bounds(head + end, **options) for end in (tail or [1.0], other_tail or [0.01], []))
    assert [b for b in full[:-1] if b <= len(head)] == [b for b in other[:-1] if b <= len(head)]
    assert [b for b in full[:-1] if b < len(head)] == [b for b in cut_off if b < len(head)]


@quick
@given(probabilities, st.integers(1, 5))
def test_all_but_the_last_segment_hold_m_uncertain_tokens_and_end_with_one(sampled_with, every):
    result = bounds(sampled_with, every=every)
    uncertain = [p < 0.9 for p in sampled_with]
    assert all(sum(uncertain[a:b]) == every and uncertain[b - 1] for a, b in pairwise(result[:-1]))
    assert len(result) - 1 in (sum(uncertain) // every, sum(uncertain) // every + 1) or not sampled_with


@quick
@given(probabilities, st.booleans(), limits)
def test_limits_hold_and_every_cut_is_a_candidate_or_a_split(sampled_with, ends, options):
    assume(sampled_with)
    result = bounds(sampled_with, ends=ends, **options)
    with_text = len(sampled_with) - ends
    assert (result[0], result[-1]) == (0, len(sampled_with))
    assert all(b < max(with_text, 1) for b in result[:-1])
    lengths = [b - a for a, b in pairwise(result[:-1])]
    longest, most = options["max_tokens"], options["max_segments"]
    assert all(options["min_tokens"] <= length <= (longest or length) for length in lengths)
    assert most is None or len(result) - 1 <= most
    assert longest is None or len(result) - 1 == most or with_text - result[-2] <= longest
    candidates = uncertain_cuts(list(map(math.log, sampled_with)), every=options["every"], threshold=0.9)
    assert all(b in candidates or b - a == longest for a, b in pairwise(result[:-1]))


def test_a_candidate_too_close_is_dropped_and_the_count_runs_on():
    sampled_with = [0.1] * 4 + [1.0] * 2 + [0.1] * 4 + [1.0]  # candidates for 2: 2, 4, 8, 10
    assert bounds(sampled_with, every=2) == (0, 2, 4, 8, 10, 11)
    assert bounds(sampled_with, every=2, min_tokens=3) == (0, 4, 8, 11)
    assert bounds(sampled_with, every=2, min_tokens=5) == (0, 8, 11)


def test_long_segments_are_split_and_the_count_runs_on():
    sampled_with = [1.0] * 6 + [0.1] + [1.0] * 5 + [0.1] + [1.0] * 6  # uncertain: 6, 12
    assert bounds(sampled_with, every=1) == (0, 7, 13, 19)
    assert bounds(sampled_with, every=1, max_tokens=4) == (0, 4, 7, 11, 13, 17, 19)
    assert bounds(sampled_with, every=2, max_tokens=6) == (0, 6, 12, 13, 19)
    assert bounds(sampled_with, every=2, max_tokens=6, min_tokens=2) == (0, 6, 12, 18, 19)


def test_after_max_segments_nothing_is_cut():
    assert bounds([0.1] * 9, every=2, max_segments=3) == (0, 2, 4, 9)
    assert bounds([0.1] * 9, every=2, max_segments=1) == (0, 9)
    assert bounds([1.0] * 5 + [0.1] * 4, every=1, max_tokens=2, max_segments=4) == (0, 2, 4, 6, 9)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"threshold": 0.0}, {"threshold": 1.01}, {"threshold": math.nan}])
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(ValidationError):
        CutpointsSegmentation(**wrong)
    with pytest.raises(ValueError, match="need every >= 1"):
        uncertain_cuts([0.0], **{"every": 1, "threshold": 0.9} | wrong)


def test_a_least_length_above_the_greatest_is_refused():
    with pytest.raises(ValidationError, match="min_tokens 5 exceeds max_tokens 4"):
        CutpointsSegmentation(min_tokens=5, max_tokens=4)
