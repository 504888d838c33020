import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.values import continuation_counts, distinct_states, state_value
from ray_rl.config.values import FixedValues, NoValues
from ray_rl.types import Reward


def test_equal_prefixes_are_one_state():
    states, starts = distinct_states([(1, 2, 3, 4), (1, 2, 5, 6), (1, 9)], [(0, 2, 4), (0, 2, 4), (0, 1, 2)])
    assert [(s.trajectory, s.boundary, s.prefix) for s in states] == [(0, 0, ()), (0, 2, (1, 2)), (2, 1, (1,))]
    assert starts == [[0, 1], [0, 1], [0, 2]]


def test_an_empty_completion_has_no_states():
    assert distinct_states([()], [(0,)]) == ([], [[]])


def test_fixed_gives_every_state_k():
    states, _ = distinct_states([(1, 2)], [(0, 1, 2)])
    assert continuation_counts(FixedValues(num_continuations=3), states) == [3, 3]
    assert continuation_counts(NoValues(), states) == [0, 0]


def test_value_by_hand():
    value = state_value(4, [Reward(value=1.0), Reward(value=0.0), Reward(value=1.0)])
    assert value.mean == pytest.approx(2 / 3)
    # variance (1/9 + 4/9 + 1/9) / 2 = 1/3, of the mean 1/9
    assert value.stderr == pytest.approx(1 / 3)
    assert (value.boundary, value.count) == (4, 3)


def test_failed_gradings_do_not_count():
    value = state_value(0, [Reward(value=1.0), Reward(value=0.0, failure="timeout")])
    assert (value.mean, value.count, value.stderr) == (1.0, 1, math.inf)
    unknown = state_value(0, [Reward(value=0.0, failure="timeout")])
    assert unknown.count == 0
    assert math.isnan(unknown.mean)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30))
def test_value_of_binary_rewards_has_the_binomial_error(rewards):
    value = state_value(0, [Reward(value=r) for r in rewards])
    p, n = sum(rewards) / len(rewards), len(rewards)
    assert value.mean == pytest.approx(p)
    assert value.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
