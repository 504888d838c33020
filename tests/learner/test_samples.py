import itertools
import math
from dataclasses import replace
from statistics import mean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.samples import training_samples, weigh, whiten, without_confident_tokens
from ray_rl.config import resolve_config
from ray_rl.types import TrainingSample
from tests.learner.groups import PROMPT, make_continuation, make_group, make_trajectory

finite = st.floats(min_value=-100, max_value=100)


def comparing(kind="dr_grpo", *overrides):
    return resolve_config({}, [f"advantage.kind={kind}", "values.kind=none", *overrides])


def valuing(*overrides):
    return resolve_config({}, ["values.train_on_continuations=true", *overrides])


COMPARING, VALUING = comparing(), valuing()


def make_sample(advantages, weights=None, *, is_continuation=False):
    """A prompt of one token and one token per advantage."""
    return TrainingSample(
        token_ids=(1,) * (len(advantages) + 1),
        loss_mask=(False,) + (True,) * len(advantages),
        behavior_logprobs=(0.0,) + (-1.0,) * len(advantages),
        advantages=(0.0, *advantages),
        weights=(0.0, *(weights or [1.0] * len(advantages))),
        is_continuation=is_continuation,
    )


def test_samples_carry_prompt_and_completion_and_train_the_completion_only():
    group = make_group(make_trajectory([5, 6, 7], 1.0), make_trajectory([8], 0.0))
    first, second = training_samples(group, COMPARING)
    assert first == TrainingSample(
        token_ids=(1, 2, 5, 6, 7),
        loss_mask=(False, False, True, True, True),
        behavior_logprobs=(0.0, 0.0, -0.1, -0.2, -0.1 * 3),
        advantages=(0.0, 0.0, 0.5, 0.5, 0.5),
        weights=(0.0, 0.0, 1.0, 1.0, 1.0),
    )
    assert second.advantages == (0.0, 0.0, -0.5)


def test_a_trajectory_whose_grading_failed_keeps_its_place_without_loss_tokens():
    graded = [make_trajectory([5], 1.0), make_trajectory([6], 0.0)]
    failed = make_trajectory([7, 8], -1.0, failure="timeout after 5.0 s")
    for kind in ("grpo", "dr_grpo", "rloo"):
        first, blank, second = training_samples(make_group(graded[0], failed, graded[1]), comparing(kind))
        assert [first, second] == training_samples(make_group(*graded), comparing(kind))
        assert blank.token_ids == (1, 2, 7, 8)
        assert blank.loss_tokens == 0
        assert {*blank.advantages, *blank.behavior_logprobs, *blank.weights} == {0.0}


def test_tokens_sampled_with_at_least_the_threshold_leave_mask_advantages_logprobs_and_weights():
    logprobs = [math.log(p) for p in (0.5, 0.95, 0.89, 1.0)]
    group = make_group(make_trajectory([5, 6, 7, 8], 1.0, logprobs=logprobs), make_trajectory([9], 0.0))
    sample, _ = training_samples(group, comparing("dr_grpo", "learner.loss.confident_above=0.9"))
    assert sample == TrainingSample(
        token_ids=(1, 2, 5, 6, 7, 8),
        loss_mask=(False, False, True, False, True, False),
        behavior_logprobs=(0.0, 0.0, logprobs[0], 0.0, logprobs[2], 0.0),
        advantages=(0.0, 0.0, 0.5, 0.0, 0.5, 0.0),
        weights=(0.0, 0.0, 1.0, 0.0, 1.0, 0.0),
        confident_tokens=2,
    )


def test_a_probability_of_exactly_the_threshold_is_confident():
    sample = replace(make_sample([1.0, 1.0]), behavior_logprobs=(0.0, 0.0, -1e-9))
    assert without_confident_tokens(sample, 1.0).loss_mask == (False, False, True)


def test_the_mask_changes_no_advantage_of_a_token_that_stays():
    trajectories = [make_trajectory([5, 6], r, logprobs=(-0.01, -2.0)) for r in (1.0, 0.0, 0.0)]
    masked = training_samples(make_group(*trajectories), comparing("grpo", "learner.loss.confident_above=0.9"))
    plain = training_samples(make_group(*trajectories), comparing("grpo"))
    assert [sample.advantages[-1] for sample in masked] == [sample.advantages[-1] for sample in plain]


def test_a_continuation_trains_its_own_tokens_by_its_surprise():
    group = make_group(
        make_trajectory([5, 6, 7], 1.0, values=(0.5,)),
        continuations=[make_continuation(0, 2, [8, 9], reward=1.0, baseline=0.25)],
    )
    _, sample = training_samples(group, VALUING)
    assert sample.token_ids == (*PROMPT, 5, 6, 8, 9)
    assert sample.loss_mask == (False,) * 4 + (True,) * 2
    assert sample.advantages == (0.0,) * 4 + (0.75,) * 2
    assert sample.behavior_logprobs == (0.0,) * 4 + (-0.1, -0.2)
    assert sample.is_continuation


def test_continuations_train_only_where_the_run_says_so():
    group = make_group(make_trajectory([5, 6], 1.0, values=(0.5,)), continuations=[make_continuation(0, 1, [8])])
    (sample,) = training_samples(group, resolve_config({}, []))
    assert sample.weights == (0.0, 0.0, 1.0, 1.0)


def test_a_continuation_of_unknown_baseline_or_failed_grading_is_left_out():
    group = make_group(
        make_trajectory([5, 6], 1.0, values=(0.5,)),
        continuations=[
            make_continuation(0, 1, [8], baseline=None),
            make_continuation(0, 1, [9], reward=0.0, failure="timeout after 5.0 s"),
        ],
    )
    (sample,) = training_samples(group, VALUING)
    assert not sample.is_continuation
    assert sample.weights == (0.0, 0.0, 1.0, 1.0)


def test_the_advantage_of_continuations_against_the_others_mean_has_the_gradient_of_the_expected_reward():
    """One token, right with probability p = sigmoid(x): d p / d x = p (1 - p), and d log pi / d x = right - p."""
    p, expected = 0.3, 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=3):
        baselines = [(sum(outcome) - own) / 2 for own in outcome]
        group = make_group(
            make_trajectory([5, 6], 1.0, values=(0.5,)),
            continuations=[
                make_continuation(0, 1, [8], reward=r, baseline=b) for r, b in zip(outcome, baselines, strict=True)
            ],
        )
        gradients = [
            sample.advantages[-1] * (right - p)
            for sample, right in zip(training_samples(group, VALUING)[1:], outcome, strict=True)
        ]
        expected += math.prod(p if right else 1 - p for right in outcome) * mean(gradients)
    assert expected == pytest.approx(p * (1 - p))


def test_weights_of_two_trajectories_and_two_continuations_by_hand():
    """Depths 0 to 4 are reached by 2, 4, 2, 2, 1 samples, of them 2, 2, 1, 1, 0 trajectories.

    Raw weights 1, 1/2, 1/2, 1/2, 1 add up to 7 over all tokens; the trajectories have 6.
    """
    group = make_group(
        make_trajectory([5, 6, 7, 8], 1.0, values=(0.5,)),
        make_trajectory([5, 9], 0.0, values=(0.5,)),
        continuations=[make_continuation(0, 1, [6, 7, 7, 8]), make_continuation(1, 1, [0])],
    )
    rows = [sample.weights[2:] for sample in training_samples(group, VALUING)]
    full, half = 6 / 7, 3 / 7
    expected = [(full, half, half, half), (full, half), (0.0, half, half, half, full), (0.0, half)]
    assert rows == [pytest.approx(row) for row in expected]


def test_weights_count_only_tokens_that_the_mask_leaves():
    """After the mask depth 0 has the first trajectory's token and depth 1 the continuation's alone."""
    sure, unsure = -0.01, -2.0
    group = make_group(
        make_trajectory([5, 6], 1.0, values=(0.5,), logprobs=(unsure, sure)),
        make_trajectory([7, 8], 0.0, values=(0.5,), logprobs=(sure, sure)),
        continuations=[make_continuation(0, 1, [9], logprobs=(unsure,))],
    )
    samples = training_samples(group, valuing("learner.loss.confident_above=0.9"))
    assert [sample.weights[2:] for sample in samples] == [(0.5, 0.0), (0.0, 0.0), (0.0, 0.5)]


def test_continuations_of_a_group_without_training_completions_are_left_out():
    failed = make_trajectory([5, 6], 0.0, values=(0.5,), failure="timeout after 5.0 s")
    (sample,) = training_samples(make_group(failed, continuations=[make_continuation(0, 1, [8])]), VALUING)
    assert sample.loss_tokens == 0


@st.composite
def groups(draw):
    logprobs = st.floats(-3, 0)
    trajectories = [
        make_trajectory([5] * len(row), draw(finite), values=(0.5,), logprobs=row, failure=draw(failures))
        for row in draw(st.lists(st.lists(logprobs, min_size=1, max_size=6), min_size=1, max_size=4))
    ]
    continuations = []
    for row in draw(st.lists(st.lists(logprobs, min_size=1, max_size=6), max_size=8)):
        index = draw(st.integers(0, len(trajectories) - 1))
        boundary = draw(st.integers(0, len(trajectories[index].completion.token_ids) - 1))
        baseline = draw(st.none() | finite)
        continuations.append(make_continuation(index, boundary, [6] * len(row), baseline=baseline, logprobs=row))
    return make_group(*trajectories, continuations=continuations)


failures = st.sampled_from([None, None, None, "timeout after 5.0 s"])
masks = st.sampled_from([(), ("learner.loss.confident_above=0.3",)])


@given(groups(), masks)
def test_the_weight_of_a_prompt_does_not_depend_on_its_continuations(group, mask):
    samples = training_samples(group, valuing(*mask))
    alone = training_samples(group, resolve_config({}, [*mask]))
    own = sum(sample.loss_tokens for sample in alone)
    assert math.fsum(w for sample in samples for w in sample.weights) == pytest.approx(own)
    for sample in samples:
        assert [weight > 0 for weight in sample.weights] == list(sample.loss_mask)
    for at_depth in itertools.zip_longest(*(sample.weights for sample in samples), fillvalue=0.0):
        assert len({weight for weight in at_depth if weight}) <= 1


@given(groups(), masks)
def test_without_continuations_every_weight_is_exactly_one(group, mask):
    lone = make_group(*group.trajectories)
    for config in (resolve_config({}, [*mask]), valuing(*mask)):
        for sample in training_samples(lone, config):
            assert sample.weights == tuple(float(trains) for trains in sample.loss_mask)


def test_the_weights_of_no_samples_are_none():
    assert weigh([]) == []


@given(st.lists(st.lists(finite, min_size=1, max_size=6), min_size=1, max_size=6))
def test_whitening_gives_mean_zero_and_unbiased_variance_one_over_loss_tokens(rows):
    samples = [make_sample(row) for row in rows]
    flat = [a for row in rows for a in row]
    result = [a for sample in whiten(samples) for a in sample.advantages[1:]]
    assert all(sample.advantages[0] == 0.0 for sample in whiten(samples))
    if len(flat) == 1:
        assert result == flat
    elif variance(flat) > 1e-3:
        assert mean(result) == pytest.approx(0, abs=1e-6)
        assert variance(result) == pytest.approx(1, rel=1e-4)


def test_weighted_whitening_by_hand():
    """Weights 2, 1, 1 of 3, 0, 6: mean 3, sum of squares 18, denominator 4 - 6 / 4 = 2.5, variance 7.2."""
    samples = whiten([make_sample([3.0, 0.0], [2.0, 1.0]), make_sample([6.0], [1.0])])
    scale = 3 / math.sqrt(7.2)
    assert samples[0].advantages[1:] == pytest.approx((0.0, -scale))
    assert samples[1].advantages[1:] == pytest.approx((scale,))


def test_whitening_ignores_the_scale_of_the_weights():
    plain = [make_sample([3.0, 0.0]), make_sample([6.0])]
    light = [make_sample([3.0, 0.0], [0.1, 0.1]), make_sample([6.0], [0.1])]
    for left, right in zip(whiten(plain), whiten(light), strict=True):
        assert left.advantages == pytest.approx(right.advantages)


def test_whitening_leaves_masked_tokens_out():
    masked = TrainingSample(
        token_ids=(1, 2, 3, 4),
        loss_mask=(False, True, False, True),
        behavior_logprobs=(0.0, -1.0, 0.0, -1.0),
        advantages=(0.0, 1.0, 0.0, 3.0),
        weights=(0.0, 1.0, 0.0, 1.0),
    )
    (whitened,) = whiten([masked])
    assert whitened.advantages == pytest.approx((0.0, -math.sqrt(0.5), 0.0, math.sqrt(0.5)))
