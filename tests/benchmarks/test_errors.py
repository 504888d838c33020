import math

import pytest

from benchmarks.values.errors import JudgedCompletion, mean_and_ci95, pooled_rmse, price_at, prompt_errors, rmse
from benchmarks.values.reference import Estimate


def exact(value):
    return Estimate(mean=value, variance=0.0)


def judged(**changes):
    facts = {
        "reward": 1.0,
        "lengths": [1, 3],
        "values": [0.5, 0.75],
        "advantages": [0.25, 0.25],
        "true_values": [exact(0.25), exact(0.75)],
        "true_advantages": [exact(0.5), exact(0.25)],
    }
    return JudgedCompletion(**facts | changes)


def test_errors_of_one_completion_by_hand():
    errors = prompt_errors([judged()])
    assert errors.advantage == pytest.approx(1 * 0.25**2 / 4)  # over tokens
    assert errors.value == pytest.approx(0.25**2 / 2)  # over states
    assert (errors.bias, errors.bias_to_outcome) == (0.125, 0.125)
    assert errors.ranked == 0.5  # the two are estimated alike


def test_bias_to_the_outcome_changes_its_sign_with_the_outcome():
    errors = prompt_errors([judged(reward=0.0)])
    assert (errors.bias, errors.bias_to_outcome) == (0.125, -0.125)


def test_the_references_own_variance_is_taken_off():
    noisy = [Estimate(mean=0.5, variance=0.0625), exact(0.25)]
    assert prompt_errors([judged(true_advantages=noisy)]).advantage == pytest.approx(0.0)


def test_states_without_a_value_have_no_error():
    errors = prompt_errors([judged(values=[math.nan, 1.0])])
    assert (errors.bias, errors.value) == (0.25, 0.0625)


def test_segments_that_the_reference_hardly_tells_apart_are_not_ranked():
    assert math.isnan(prompt_errors([judged(true_advantages=[exact(0.3), exact(0.25)])]).ranked)


def test_the_mean_of_roots_is_not_the_root_of_the_mean():
    assert rmse([0.0, 0.04, -0.01]) == pytest.approx(0.2 / 3)
    assert pooled_rmse([0.0, 0.04, -0.01]) == pytest.approx(0.1)


def test_confidence_interval_of_a_mean():
    mean, (low, high) = mean_and_ci95([0.0, 1.0, math.nan])
    assert mean == 0.5
    assert high - mean == pytest.approx(mean - low) == pytest.approx(1.96 * 0.5)


def test_price_is_interpolated_in_logarithms():
    points = [{"tokens": 1.0, "error": 0.4}, {"tokens": 4.0, "error": 0.2}, {"tokens": 16.0, "error": 0.1}]
    assert price_at(0.2, points, price="tokens", by="error") == pytest.approx(4.0)
    assert price_at(0.2 * math.sqrt(2), points, price="tokens", by="error") == pytest.approx(2.0)
    assert math.isnan(price_at(0.05, points, price="tokens", by="error"))
    assert price_at(0.5, points, price="tokens", by="error") == 1.0
