"""Reductions against hand-worked numbers and brute force."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_rl.metrics import evaluation_metrics, majority_reward, pass_at_k, step_metrics
from ray_rl.types import GroupCost, Reward, ScoredSample
from tests.fakes import prompt, summary


def sample(value: float, answer: str = "", tokens: int = 5, finished: bool = True) -> ScoredSample:
    return ScoredSample(reward=Reward(value=value), answer=answer, tokens=tokens, finished=finished)


def cost(primary: int = 10, continuation: int = 0, states: int = 0, prefix: int = 0, cached: int = 0) -> GroupCost:
    return GroupCost(
        primary_tokens=primary,
        prompt_tokens=4 * primary,
        cached_prompt_tokens=primary,
        continuations=3 * states,
        continuation_tokens=continuation,
        states=states,
        closed_states=0,
        rounds=0,
        prefix_tokens=prefix,
        cacheable_prefix_tokens=2 * cached,
        cached_prefix_tokens=cached,
        seconds=2.0,
    )


@st.composite
def counts(draw) -> tuple[int, int, int]:
    n = draw(st.integers(1, 9))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(counts())
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_correct_one(numbers):
    n, c, k = numbers
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_rewards_lengths_and_truncation_are_means_over_completions():
    groups = [
        summary(0, rewards=(1.0, 0.0), lengths=(10, 20), truncated=1, segments=4),
        summary(1, rewards=(0.0, 0.0), lengths=(30, 40), truncated=0, segments=6),
    ]
    metrics = step_metrics(groups, version=0)
    assert metrics["reward/mean"] == 0.25
    assert metrics["reward/accuracy"] == 0.25
    assert metrics["reward/std"] == pytest.approx(math.sqrt(3) / 4)
    assert metrics["rollout/response_length_mean"] == 25
    assert metrics["rollout/truncated_rate"] == 0.25
    assert metrics["segments/per_trajectory"] == 2.5
    assert metrics["groups/decided_fraction"] == 0.5


def test_dropped_groups_count_in_rewards_failures_and_cost_but_not_in_what_is_trained():
    trained = [summary(0, rewards=(1.0, 0.0), version=3, graded=10, cost=cost(10, 5, 1))]
    filtered = [summary(1, rewards=(1.0, 1.0), version=1, graded=10, failures=3, cost=cost(20))]
    stale = [summary(2, rewards=(0.0, 0.0), version=0, graded=10, cost=cost(30, 7, 1))]
    metrics = step_metrics(trained, version=3, filtered=filtered, stale=stale)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/failures"] == 0.1
    assert (metrics["tokens/primary"], metrics["tokens/continuations"]) == (60, 12)
    assert metrics["groups/decided_fraction"] == pytest.approx(2 / 3)
    assert (metrics["groups/count"], metrics["groups/filtered"], metrics["groups/decided_trained"]) == (1, 1, 0)
    assert metrics["staleness/max"] == 0


def test_a_step_that_dropped_every_group_has_rewards_but_no_staleness():
    metrics = step_metrics([], version=0, filtered=[summary(0, rewards=(1.0, 1.0))])
    assert (metrics["reward/mean"], metrics["groups/count"], metrics["groups/filtered"]) == (1.0, 0, 1)
    assert not any(name.startswith("staleness/") for name in metrics)


def test_decided_groups_that_are_trained_on_are_counted():
    metrics = step_metrics([summary(0), summary(1, rewards=(1.0, 1.0))], version=0)
    assert (metrics["groups/decided_trained"], metrics["groups/filtered"]) == (1, 0)


def test_failures_are_a_share_of_gradings_and_zero_when_nothing_was_graded():
    assert step_metrics([summary(failures=1, graded=3), summary(failures=0, graded=1)], 0)["reward/failures"] == 0.25
    assert step_metrics([summary(failures=0, graded=0)], 0)["reward/failures"] == 0.0


def test_staleness_counts_from_the_oldest_version_of_a_group():
    metrics = step_metrics([summary(version=3), summary(version=5)], version=5)
    assert metrics["staleness/mean"] == 1.0
    assert metrics["staleness/max"] == 2.0


def test_groups_that_mix_versions_are_counted_and_the_mixture_is_measured():
    groups = [
        summary(version=5),
        summary(oldest_version=3, newest_version=5),
        summary(oldest_version=4, newest_version=5),
    ]
    metrics = step_metrics(
        [*groups, summary(version=2)], version=5, stale=[summary(oldest_version=0, newest_version=5)]
    )
    assert (metrics["staleness/mixed_fraction"], metrics["staleness/spread_max"]) == (0.5, 2)


def test_a_group_of_one_version_mixes_nothing_however_old_it_is():
    metrics = step_metrics([summary(version=3)], version=5)
    assert (metrics["staleness/mixed_fraction"], metrics["staleness/spread_max"]) == (0, 0)


def test_shares_of_continuations_weigh_groups_by_their_tokens():
    groups = [
        summary(cost=cost(primary=10, continuation=30, states=2, prefix=100, cached=50)),
        summary(cost=cost(primary=30, continuation=30, states=4, prefix=300, cached=250)),
    ]
    metrics = step_metrics(groups, 0)
    assert metrics["continuations/tokens_share"] == 0.6
    assert metrics["continuations/cache_hit_rate"] == 0.75
    assert metrics["continuations/cache_hits_of_possible"] == 0.5
    assert metrics["continuations/per_state"] == 3
    assert metrics["tokens/primary"] == 40
    assert metrics["tokens/continuations"] == 60


def test_the_prompt_cache_hit_rate_is_a_share_of_the_completions_prompt_tokens():
    half = dataclasses.replace(cost(10), prompt_tokens=20, cached_prompt_tokens=10)
    none = dataclasses.replace(cost(10), prompt_tokens=60, cached_prompt_tokens=0)
    assert step_metrics([summary(cost=half), summary(cost=none)], 0)["rollout/cache_hit_rate"] == 0.125


def test_values_weigh_groups_by_segments_and_leave_out_groups_without_any():
    groups = [
        summary(segments=1, value_mean=1.0, value_stderr=math.nan),
        summary(segments=3, value_mean=0.0, value_stderr=0.2),
        summary(segments=9, value_mean=math.nan, value_stderr=math.nan),
    ]
    metrics = step_metrics(groups, 0)
    assert metrics["values/mean"] == 0.25
    assert metrics["values/stderr"] == pytest.approx(0.2)


def test_without_values_there_are_no_metrics_of_values():
    metrics = step_metrics([summary(value_mean=math.nan, value_stderr=math.nan, cost=cost())], 0)
    assert not [name for name in metrics if name.startswith(("values/", "continuations/"))]
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_majority_is_by_votes_not_by_rewards():
    assert majority_reward([sample(0, "3"), sample(0, "3"), sample(1, "4")]) == 0.0
    assert majority_reward([sample(1, "4"), sample(0, "3"), sample(1, "4")]) == 1.0


def test_a_tie_is_worth_the_mean_of_the_tied_answers():
    assert majority_reward([sample(1, "4"), sample(0, "3"), sample(0, "")]) == 0.5


def test_the_unanswered_do_not_vote():
    assert majority_reward([sample(0, ""), sample(0, ""), sample(1, "4")]) == 1.0
    assert majority_reward([sample(0, "")]) == 0.0


def test_evaluation_by_hand():
    sampled = [
        (sample(1, "4", 4), sample(0, "3", 6), sample(1, "4", 5), sample(0, "", 9, finished=False)),
        (sample(0, "1", 4),) * 4,
    ]
    greedy = [(sample(1, "4"),), (sample(0, "1"),)]
    metrics = evaluation_metrics([prompt(-1)] * 2, sampled, greedy)
    assert metrics["eval/pass@1"] == 0.25
    assert metrics["eval/pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert metrics["eval/pass@4"] == 0.5
    assert metrics["eval/majority@4"] == 0.5
    assert metrics["eval/greedy"] == 0.5
    assert metrics["eval/response_length_mean"] == 5.0
    assert metrics["eval/truncated_rate"] == 0.125


def test_one_sample_gives_neither_pass_at_k_nor_a_majority():
    metrics = evaluation_metrics([prompt(-1)], [(sample(1, "4"),)], None)
    assert {"eval/pass@1", "eval/response_length_mean", "eval/truncated_rate"} <= set(metrics)
    assert not {name for name in metrics if name.startswith(("eval/pass@2", "eval/majority", "eval/greedy"))}


def test_pass_at_1_of_graded_rewards_is_their_mean():
    metrics = evaluation_metrics([prompt(-1)], [(sample(0.5), sample(1.0))], None)
    assert metrics["eval/pass@1"] == 0.75
    assert metrics["eval/pass@2"] == 1.0


def test_missing_answers_are_an_error():
    with pytest.raises(ValueError, match="2 prompts, 1 sampled"):
        evaluation_metrics([prompt(-1)] * 2, [(sample(1),)], None)
