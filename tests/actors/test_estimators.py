"""Every estimator against a policy whose values are known exactly (shared numbers: VinePPO's analytic anchors).

Statistical tests allow 5 standard errors: each fails by chance with probability 6e-7, all of this file together < 2e-4.
"""

import math
import random

import pytest

from actors.values import replay
from learner.advantages import ADVANTAGES, segment_advantages
from ray_rl.config.values import AdaptiveValues, FixedValues
from tests.actors.chain import Chain, mean_and_error

CHAIN = Chain(n=5, q=0.9)
OPEN = Chain(n=6, q=0.7)
UNBIASED = {
    "fixed": FixedValues(num_continuations=3),
    "fixed, pooled": FixedValues(num_continuations=2, pooling="passing"),
    "fixed, backed up": FixedValues(num_continuations=2, pooling="backup"),
    "fixed, backed up, K=1": FixedValues(num_continuations=1, pooling="backup"),
    "adaptive, never closed": AdaptiveValues(max_bias=0, num_continuations=3, token_budget=50),
    "adaptive, never closed, pooled": AdaptiveValues(max_bias=0, pooling="passing", token_budget=50),
    "adaptive, never closed, not pooled": AdaptiveValues(max_bias=0, pooling="none", token_budget=50),
    "adaptive, never closed, short of budget": AdaptiveValues(max_bias=0, num_continuations=6, token_budget=2),
}
ADAPTIVE = {
    "adaptive": AdaptiveValues(),
    "adaptive, states": AdaptiveValues(token_budget=50, closing="states"),
    "adaptive, strict": AdaptiveValues(token_budget=50, closing="states", max_bias=0.06),
    "adaptive, pooled": AdaptiveValues(token_budget=50, closing="states", pooling="passing"),
    "adaptive, not pooled": AdaptiveValues(token_budget=50, closing="states", pooling="none"),
    "adaptive, short of budget": AdaptiveValues(token_budget=1, closing="states"),
}
ALL = UNBIASED | ADAPTIVE


def errors_by_depth(config, chain, groups, seed=0):
    """[depth] the mean error of a group's values there, one number per group."""
    rng = random.Random(seed)
    errors = [[] for _ in range(chain.n)]
    for _ in range(groups):
        group = chain.group(config, rng)
        for depth in range(chain.n):
            found = [
                trajectory.values[depth].mean - chain.value(trajectory.completion.token_ids[:depth])
                for trajectory in group.trajectories
                if trajectory.values[depth].count
            ]
            if found:
                errors[depth].append(math.fsum(found) / len(found))
    return errors


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("chain", [CHAIN, OPEN], ids=["sharp", "open"])
def test_values_are_unbiased_at_every_depth(name, chain):
    for of_depth in errors_by_depth(UNBIASED[name], chain, 700):
        mean, error = mean_and_error(of_depth)
        assert abs(mean) <= 5 * error


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("chain", [CHAIN, OPEN], ids=["sharp", "open"])
def test_the_bias_of_closing_stays_within_max_bias(name, chain):
    for of_depth in errors_by_depth(ADAPTIVE[name], chain, 400):
        mean, error = mean_and_error(of_depth)
        assert abs(mean) <= ADAPTIVE[name].max_bias + 5 * error


def squares(config, chain, groups, seed=0):
    """Per group, the mean over its completions of sum_k A_k^2."""
    rng = random.Random(seed)
    found = []
    for _ in range(groups):
        group = chain.group(config, rng, group_size=2)
        per_token = ADVANTAGES["vineppo"](group)  # a segment of the chain is a token
        found.append(math.fsum(a * a for tokens in per_token for a in tokens) / len(per_token))
    return found


@pytest.mark.parametrize(("k", "expected"), [(1, 1.552), (3, 0.679), (9, 0.387)])
def test_fixed_k_has_the_analytic_sum_of_squared_advantages(k, expected):
    mean, error = mean_and_error(squares(FixedValues(num_continuations=k), CHAIN, 2500))
    assert mean == pytest.approx(expected, abs=5 * error + 0.0005)
    assert error < 0.05


@pytest.mark.parametrize("name", ALL)
def test_advantages_add_up_to_reward_minus_the_prompts_value(name):
    rng = random.Random(3)
    for _ in range(30):
        group = OPEN.group(ALL[name], rng)
        for trajectory in group.trajectories:
            known = [value.mean for value in trajectory.values if value.count]
            advantages = segment_advantages(known, trajectory.reward.value)
            assert math.fsum(advantages) == pytest.approx(trajectory.reward.value - known[0])


@pytest.mark.parametrize("name", ALL)
def test_every_decision_can_be_taken_again_from_the_record(name):
    rng = random.Random(5)
    for _ in range(20):
        group = OPEN.group(ALL[name], rng)
        rounds = replay(ALL[name], group)
        assert len(rounds) == group.cost.rounds
        assert sum(count for asked in rounds for count in asked.values()) == group.cost.continuations


def test_a_record_of_another_configuration_is_refused():
    group = OPEN.group(FixedValues(num_continuations=3), random.Random(1))
    with pytest.raises(ValueError, match="not asked for"):
        replay(FixedValues(num_continuations=2), group)
    with pytest.raises(ValueError, match="lacks"):
        replay(FixedValues(num_continuations=4), group)


@pytest.mark.parametrize("k", [1, 3, 9, 27])
@pytest.mark.parametrize("p", [0.5, 0.25, 0.1])
def test_mean_absolute_error_of_a_value_is_the_binomial_one(k, p):
    table = {
        0.5: {1: 0.5, 3: 0.25, 9: 0.137, 27: 0.078},
        0.25: {1: 0.375, 3: 0.211, 9: 0.117, 27: 0.067},
        0.1: {1: 0.18, 3: 0.146, 9: 0.078, 27: 0.047},
    }
    chain, rng = Chain(n=1, q=p), random.Random(k)
    config = FixedValues(num_continuations=k)
    found = [abs(chain.group(config, rng, group_size=1).trajectories[0].values[0].mean - p) for _ in range(3000)]
    mean, error = mean_and_error(found)
    assert mean == pytest.approx(table[p][k], abs=5 * error + 0.0005)


@pytest.mark.parametrize(("k", "right", "tie"), [(1, 0.36, 0.48), (3, 0.544, 0.276), (9, 0.737, 0.128)])
def test_the_better_of_two_states_is_ranked_first_as_often_as_the_binomial_law_says(k, right, tie):
    rng, config = random.Random(k), FixedValues(num_continuations=k)
    pairs = [
        tuple(Chain(n=1, q=p).group(config, rng, group_size=1).trajectories[0].values[0].mean for p in (0.6, 0.4))
        for _ in range(4000)
    ]
    for share, expected in ((sum(a > b for a, b in pairs), right), (sum(a == b for a, b in pairs), tie)):
        error = math.sqrt(expected * (1 - expected) / len(pairs))
        assert share / len(pairs) == pytest.approx(expected, abs=5 * error + 0.0005)
