import math
from fractions import Fraction
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from learner.advantages import (
    ADVANTAGES,
    broadcast_to_tokens,
    centered,
    group_relative,
    leave_one_out,
    segment_advantages,
    token_advantages,
)
from ray_rl.config.advantage import GrpoAdvantage, VineppoAdvantage
from tests.learner.groups import make_group, make_trajectory

finite = st.floats(min_value=-100, max_value=100)


def test_group_relative_of_two_right_out_of_eight_by_hand():
    # mean 1/4, population std sqrt(3)/4: a right answer gets sqrt(3), a wrong one -1/sqrt(3).
    advantages = group_relative([1, 1, 0, 0, 0, 0, 0, 0])
    assert advantages[:2] == pytest.approx([math.sqrt(3)] * 2, rel=1e-5)
    assert advantages[2:] == pytest.approx([-1 / math.sqrt(3)] * 6, rel=1e-5)


def test_centered_and_leave_one_out_by_hand():
    assert centered([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert leave_one_out([1.0, 0.0, 0.0, 1.0]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out([3.0, 1.0, 2.0]) == pytest.approx([3 - 1.5, 1 - 2.5, 2 - 2.0])


@given(st.lists(finite, min_size=2, max_size=12))
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards):
    others = [mean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    assert leave_one_out(rewards) == pytest.approx([r - o for r, o in zip(rewards, others, strict=True)], abs=1e-9)


@given(st.lists(finite, min_size=1, max_size=12))
def test_group_relative_divides_by_the_population_deviation(rewards):
    expected = [(r - mean(rewards)) / (pstdev(rewards) + 1e-6) for r in rewards]
    assert group_relative(rewards) == pytest.approx(expected, abs=1e-5)


@given(finite, st.integers(1, 9))
def test_equal_rewards_teach_group_relative_advantages_nothing(reward, count):
    for rule in (group_relative, centered, leave_one_out):
        assert rule([reward] * count) == [0.0] * count


def test_segment_advantages_by_hand():
    assert segment_advantages([0.5, 0.75, 0.25], 1.0) == [0.25, -0.5, 0.75]
    assert segment_advantages([0.5], 0.0) == [-0.5]


@given(st.lists(finite, min_size=1, max_size=30), finite)
def test_segment_advantages_sum_to_the_surprise(values, reward):
    assert sum(segment_advantages(values, reward)) == pytest.approx(reward - values[0], abs=1e-9)


def test_smoothed_segment_advantages_by_hand():
    # Targets from the end: 1; (1 - l) .25 + l 1 = .4375; (1 - l) .75 + l .4375 = .671875 (l = 1/4).
    assert segment_advantages([0.5, 0.75, 0.25], 1.0, gae_lambda=0.25) == [0.671875 - 0.5, 0.4375 - 0.75, 1 - 0.25]
    # Baselines from the start: .5; .5 .75 + .5 .5 = .625; .5 .25 + .5 .625 = .4375 (m = 1/2).
    assert segment_advantages([0.5, 0.75, 0.25], 1.0, baseline_smoothing=0.5) == [0.75 - 0.5, 0.25 - 0.625, 1 - 0.4375]


@given(st.lists(finite, min_size=1, max_size=30), finite)
def test_lambda_one_is_the_reward_minus_the_states_value(values, reward):
    expected = [reward - value for value in values]
    assert segment_advantages(values, reward, gae_lambda=1.0) == pytest.approx(expected, abs=1e-9)


@given(st.lists(finite, min_size=1, max_size=30), finite, st.floats(0, 1))
def test_lambda_returns_are_sums_of_discounted_changes(values, reward, lam):
    # GAE's own form: A_k = sum_j lambda^j delta_{k+j}.
    deltas = segment_advantages(values, reward)
    expected = [sum(lam**j * delta for j, delta in enumerate(deltas[k:])) for k in range(len(deltas))]
    assert segment_advantages(values, reward, gae_lambda=lam) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "smoothed",
    [{}, {"gae_lambda": 0.3}, {"baseline_smoothing": 0.5}, {"gae_lambda": 0.3, "baseline_smoothing": 0.5}],
)
def test_smoothing_keeps_the_expected_gradient(smoothed):
    # A chain of two free choices with logits a and b (score: 1 - pi if 1 was taken, else -pi), values from one continuation
    # each. All choices and all samples are enumerated; the gradient must be that of the expected reward.
    rewards = {(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.5, (1, 1): 0.0}
    first, second = {0: 0.3, 1: 0.7}, {0: {0: 0.4, 1: 0.6}, 1: {0: 0.9, 1: 0.1}}
    paths = {(x, y): first[x] * second[x][y] for x in (0, 1) for y in (0, 1)}
    exact = {x: sum(second[x][y] * rewards[x, y] for y in (0, 1)) for x in (0, 1)}
    gradient = [0.0, 0.0, 0.0]  # with respect to the first choice's logit, and the second's after 0 and after 1
    for (x, y), p in paths.items():
        for start, p_start in paths.items():  # a continuation of the prompt
            for z in (0, 1):  # a continuation of the state after x
                weight = p * p_start * second[x][z]
                values = [rewards[start], rewards[x, z]]
                advantages = segment_advantages(values, rewards[x, y], **smoothed)
                gradient[0] += weight * advantages[0] * (x - first[1])
                gradient[1 + x] += weight * advantages[1] * (y - second[x][1])
    expected = [first[0] * first[1] * (exact[1] - exact[0])]
    expected += [first[x] * second[x][0] * second[x][1] * (rewards[x, 1] - rewards[x, 0]) for x in (0, 1)]
    assert gradient == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(finite, st.integers(1, 5)), min_size=1, max_size=8))
def test_every_token_takes_the_advantage_of_its_segment(segments):
    boundaries = [0]
    for _, length in segments:
        boundaries.append(boundaries[-1] + length)
    tokens = broadcast_to_tokens([a for a, _ in segments], boundaries)
    assert len(tokens) == boundaries[-1]
    for (advantage, _), start, end in zip(segments, boundaries, boundaries[1:], strict=False):
        assert set(tokens[start:end]) == {advantage}


def expected_square(q, n, continuations=None):
    """Sum over segments of E[A^2] for a chain that is right only if each of n segments is (probability q each).

    Exact: all outcomes are enumerated, and with K continuations all counts of successes at the two states of each segment
    (independent estimates). The chain stays at value 0 after its first error, where estimates are exact.
    """
    total = 0.0
    for wrong_at in range(n + 1):  # n: never
        probability = q**wrong_at * (1 - q if wrong_at < n else 1)
        values = [q ** (n - k) if k <= wrong_at else 0.0 for k in range(n)]
        reward = 1.0 if wrong_at == n else 0.0
        exact = segment_advantages(values, reward)
        if continuations is None:
            total += probability * sum(a * a for a in exact)
            continue
        for k in range(n):
            after = [(reward, 1.0)] if k == n - 1 else estimates(values[k + 1], continuations)
            for before, p_before in estimates(values[k], continuations):
                for next_value, p_after in after:
                    # Two states: the segment itself and what follows, so the estimate of the next one takes the reward's place.
                    (advantage,) = segment_advantages([before], next_value)
                    total += probability * p_before * p_after * advantage**2
    return total


def estimates(p, k):
    if p == 0.0:
        return [(0.0, 1.0)]
    return [(s / k, math.comb(k, s) * p**s * (1 - p) ** (k - s)) for s in range(k + 1)]


def broadcast_square(q, n):
    success = Fraction(q) ** n
    return sum(float(p) * sum(a * a for a in [float(r - success)] * n) for r, p in ((1, success), (0, 1 - success)))


@pytest.mark.parametrize(
    ("n", "broadcast", "exact", "k9", "k3", "k1"),
    [(10, 2.271, 0.227, 0.523, 1.113, 2.886), (5, 1.209, 0.242, 0.387, 0.679, 1.552)],
)
def test_second_moments_of_the_chain_of_segments(n, broadcast, exact, k9, k3, k1):
    q = 0.9
    assert broadcast_square(q, n) == pytest.approx(broadcast, abs=5e-4)
    assert expected_square(q, n) == pytest.approx(exact, abs=5e-4)
    assert expected_square(q, n, 9) == pytest.approx(k9, abs=5e-4)
    assert expected_square(q, n, 3) == pytest.approx(k3, abs=5e-4)
    assert expected_square(q, n, 1) == pytest.approx(k1, abs=5e-4)


def test_vineppo_gives_each_segment_its_own_and_the_last_token_the_last_ones():
    group = make_group(make_trajectory([5, 6, 7, 0], 1.0, boundaries=(0, 1, 4), values=(0.5, 0.25)))
    assert ADVANTAGES["vineppo"](group) == [(-0.25, 0.75, 0.75, 0.75)]


def test_the_configured_smoothing_is_used_and_needs_vineppo():
    group = make_group(make_trajectory([5, 6, 7], 1.0, boundaries=(0, 1, 2, 3), values=(0.5, 0.75, 0.25)))
    config = VineppoAdvantage(gae_lambda=0.25, baseline_smoothing=0.5, whiten="batch")
    assert token_advantages(group, config) == [(0.671875 - 0.5, 0.4375 - 0.625, 1 - 0.4375)]
    with pytest.raises(ValidationError, match="gae_lambda"):
        GrpoAdvantage(gae_lambda=0.25)


def test_a_failed_grading_neither_trains_nor_moves_the_baseline_of_its_group():
    graded = [make_trajectory([5], 1.0), make_trajectory([6], 0.0)]
    failed = make_trajectory([7, 8], -1.0, failure="timeout after 5.0 s")
    for kind in ("grpo", "dr_grpo", "rloo"):
        first, second = ADVANTAGES[kind](make_group(*graded))
        assert ADVANTAGES[kind](make_group(graded[0], failed, graded[1])) == [first, None, second]


def test_a_state_without_a_graded_continuation_joins_its_neighbours():
    group = make_group(make_trajectory([5, 6, 7], 1.0, boundaries=(0, 1, 2, 3), values=(0.5, None, 0.75)))
    assert ADVANTAGES["vineppo"](group) == [(0.25, 0.25, 0.25)]
    group = make_group(make_trajectory([5, 6, 7], 1.0, boundaries=(0, 1, 2, 3), values=(None, 0.5, 0.75)))
    assert ADVANTAGES["vineppo"](group) == [None]


def test_vineppo_refuses_a_trajectory_without_values():
    with pytest.raises(ValueError, match="0 state values for 1 segments"):
        ADVANTAGES["vineppo"](make_group(make_trajectory([5], 1.0)))
