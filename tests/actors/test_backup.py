"""Values that are backed up over the tree, by hand and by the exact law of what may be sampled."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.backup import Backup
from actors.evidence import Evidence
from actors.state_tree import ROOT, StateTree
from ray_rl.types import Reward

RIGHT, WRONG = Reward(value=1.0), Reward(value=0.0)
FAILED = Reward(value=0.0, failure="timeout")


def group(*completions):
    """Tree and evidence of (token ids, probabilities, reward); every token is a segment."""
    tree = StateTree(len(completions))
    for index, (tokens, probabilities, _) in enumerate(completions):
        logprobs = [math.log(probability) for probability in probabilities]
        tree.add(index, tokens, logprobs, tuple(range(len(tokens) + 1)))
    evidence = Evidence(tree)
    for index, (_, _, reward) in enumerate(completions):
        evidence.add_trajectory(index, reward)
    return tree, evidence


def means(tree, evidence, trajectory=0, **options):
    boundaries = range(len(tree.path(trajectory)))
    return [value.mean for value in Backup(tree, evidence, **options).values(trajectory, boundaries)]


def test_what_leaves_is_weighed_by_its_exact_probability():
    # From the last state the completion's end has probability 3/4; one continuation leaves, one does not.
    tree, evidence = group(((1, 2), (0.5, 0.75), RIGHT))
    last = tree.path(0)[1]
    evidence.add_continuation(last, (2,), RIGHT)
    evidence.add_continuation(last, (9,), WRONG)
    evidence.add_continuation(ROOT, (8,), WRONG)
    # w = (1 - 3/4) / (1 - (3/4)^2) = 4/7 at the last state, and at the prompt's (1 - 1/2) / (1 - 1/2) = 1
    assert means(tree, evidence) == pytest.approx([0.0, 1 + 4 / 7 * (0 - 1)])


def test_nothing_that_leaves_gives_the_value_ahead():
    tree, evidence = group(((1, 2), (0.5, 0.75), RIGHT))
    evidence.add_continuation(ROOT, (1, 2), RIGHT)
    evidence.add_continuation(tree.path(0)[1], (2,), RIGHT)
    assert means(tree, evidence) == [1.0, 1.0]


def test_what_leaves_into_another_state_counts_with_the_value_of_that_state():
    # Completion 1 failed after (5,), but three continuations of that state succeeded.
    tree, evidence = group(((1, 2), (0.5, 0.5), RIGHT), ((5, 6), (0.5, 0.5), WRONG))
    other = tree.path(1)[1]
    for _ in range(3):
        evidence.add_continuation(other, (7,), RIGHT)
    evidence.add_continuation(tree.path(0)[1], (3,), WRONG)
    values = Backup(tree, evidence).values(0, (0, 1))
    # The prompt's state has one sample, completion 1, which leaves: w = (1 - 1/2) / (1 - 1/2) = 1.
    assert values[0].mean == pytest.approx(3 / 4)
    assert values[0].count == 1
    assert values[1].mean == pytest.approx(0.0)


@given(
    follows=st.floats(0.01, 0.99),
    samples=st.integers(1, 5),
    ahead=st.sampled_from([0.0, 1.0]),
    leaving=st.floats(0.0, 1.0),
)
def test_the_expectation_is_the_value_whatever_the_probability_and_the_number_of_samples(
    follows, samples, ahead, leaving
):
    # One state, whose continuations follow the completion (and get its reward) or leave (and get `leaving`).
    expected = 0.0
    for pattern in product([True, False], repeat=samples):
        tree, evidence = group(((1,), (follows,), Reward(value=ahead)))
        for follow in pattern:
            evidence.add_continuation(ROOT, (1,) if follow else (2,), Reward(value=ahead if follow else leaving))
        probability = math.prod(follows if follow else 1 - follows for follow in pattern)
        expected += probability * means(tree, evidence)[0]
    assert expected == pytest.approx(follows * ahead + (1 - follows) * leaving, abs=1e-9)


def test_long_segments_give_the_plain_mean_of_the_samples():
    tree, evidence = group(((1, 2), (1e-30, 1e-30), RIGHT))
    for reward in (RIGHT, WRONG, WRONG, WRONG):
        evidence.add_continuation(ROOT, (7,), reward)
    evidence.add_continuation(tree.path(0)[1], (7,), WRONG)
    assert means(tree, evidence) == pytest.approx([1 / 4, 0.0])


def test_a_state_without_samples_is_known_only_if_the_policy_is_sure_to_go_on():
    tree, evidence = group(((1, 2), (0.5, 0.99), RIGHT))
    evidence.add_continuation(ROOT, (7,), WRONG)
    unknown = Backup(tree, evidence).values(0, (0, 1))
    assert [value.count for value in unknown] == [1, 0]
    assert math.isnan(unknown[1].mean)
    known = Backup(tree, evidence, certain=0.02).values(0, (0, 1))
    assert (known[1].mean, known[1].count) == (1.0, 1)


def test_what_was_not_graded_has_no_part():
    tree, evidence = group(((1, 2), (0.5, 0.5), FAILED), ((3, 4), (0.5, 0.5), RIGHT))
    evidence.add_continuation(tree.path(0)[1], (7,), WRONG)
    assert means(tree, evidence) == pytest.approx([1.0, 0.0])


def test_states_after_the_closed_one_are_worth_the_completions_reward():
    tree, evidence = group(((1, 2, 3), (0.5, 0.5, 0.5), WRONG), ((1, 9, 9), (0.5, 0.5, 0.5), RIGHT))
    (only,) = Backup(tree, evidence).values(0, (0,))  # the state after (1,) is closed
    # Completion 1 follows to the closed state: nothing leaves.
    assert only.mean == 0.0


def test_the_standard_error_shrinks_with_what_is_known():
    tree, evidence = group(((1,), (0.9,), RIGHT))
    for reward in (RIGHT, WRONG, RIGHT, WRONG):
        evidence.add_continuation(ROOT, (7,), reward)
    (value,) = Backup(tree, evidence).values(0, (0,))
    assert value.stderr == pytest.approx(0.1 * math.sqrt((1 / 3) / 4))
