import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.adaptive import AdaptiveEstimator, count_tests, false_agreement, samples_to_close
from actors.evidence import Evidence, state_value
from actors.state_tree import ROOT, StateTree
from actors.values import Valuation
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.errors import RunError
from ray_rl.types import Continuation, Reward
from tests.actors.chain import Chain
from tests.fakes import completion

RIGHT, WRONG = Reward(value=1.0), Reward(value=0.0)
FAILED = Reward(value=0.0, failure="timeout")
HALF = (math.log(0.5),) * 9


def tree_of(*completions, cuts=None):
    tree = StateTree(len(completions))
    for index, tokens in enumerate(completions):
        tree.add(index, tokens, HALF[: len(tokens)], cuts[index] if cuts else range(len(tokens) + 1))
    return tree


class TestTree:
    def test_equal_prefixes_are_one_state(self):
        cuts = [(0, 2, 4), (0, 2, 4), (0, 1, 2)]
        tree = tree_of((1, 2, 3, 4), (1, 2, 5, 6), (1, 9), cuts=cuts)
        assert [(s.trajectory, s.boundary, s.prefix) for s in tree.states] == [(0, 0, ()), (0, 2, (1, 2)), (2, 1, (1,))]
        assert [tree.path(index) for index in range(3)] == [[0, 1], [0, 1], [0, 2]]
        assert [tree.passing(state) for state in range(3)] == [[0, 1, 2], [0, 1], [2]]

    def test_an_empty_completion_passes_through_no_state(self):
        tree = tree_of((), cuts=[(0,)])
        assert (tree.path(0), len(tree.states), tree.passing(ROOT)) == ([], 1, [])

    def test_reach_is_the_log_probability_of_the_prefix(self):
        tree = tree_of((1, 2, 3, 4), cuts=[(0, 1, 3, 4)])
        assert [state.reach for state in tree.states] == pytest.approx([0, math.log(0.5), 3 * math.log(0.5)])

    def test_weight_counts_the_segment_that_a_state_ends_and_an_average_one_that_it_starts(self):
        tree = tree_of((1, 2, 3, 4), (1, 2, 5), cuts=[(0, 2, 4), (0, 2, 3)])
        assert tree.weights(1.75) == [2 * 1.75, 2 * (1.75 + 2)]

    def test_weight_of_a_backed_up_value_counts_every_advantage_that_its_error_enters(self):
        tree = tree_of((1, 2, 3), cuts=[(0, 1, 2, 3)])  # each segment is followed with probability 1/2
        assert tree.weights(1.0, backed_up=True) == pytest.approx([1, 1 + 0.5**2, 1 + 0.5**2 + (0.5 * 0.5) ** 2])

    def test_remaining_tokens_are_those_after_the_state_on_average(self):
        tree = tree_of((1, 2, 3, 4), (1, 2, 5), cuts=[(0, 2, 4), (0, 2, 3)])
        assert tree.remaining_tokens() == [3.5, 1.5]

    def test_a_continuation_passes_through_the_states_whose_prefix_it_writes(self):
        tree = tree_of((1, 2, 3, 4), (1, 2, 5, 6), cuts=[(0, 1, 3, 4), (0, 1, 3, 4)])
        prefixes = [tree.states[state].prefix for state in tree.passed(ROOT, (1, 2, 5, 7))]
        assert prefixes == [(), (1,), (1, 2, 5)]
        assert list(tree.passed(ROOT, (2,))) == [ROOT]
        assert [tree.states[state].prefix for state in tree.passed(1, (2, 3, 9))] == [(1,), (1, 2, 3)]


class TestEvidence:
    def evidence(self):
        tree = tree_of((1, 2, 3), (1, 2, 4), (1, 5, 6))
        evidence = Evidence(tree)
        for index, reward in enumerate((RIGHT, WRONG, WRONG)):
            evidence.add_trajectory(index, reward)
        return tree, evidence

    def test_what_passes_counts_once_and_a_completions_own_reward_not_for_itself(self):
        tree, evidence = self.evidence()
        after_one, after_two = tree.path(0)[1:]
        assert evidence.of(after_one, without=0) == [0.0, 0.0]
        assert evidence.of(after_one, without=1) == [1.0, 0.0]
        evidence.add_continuation(ROOT, (1, 2, 9), RIGHT)
        assert evidence.of(after_two, without=0) == [0.0, 1.0]
        assert sorted(evidence.of(ROOT)) == [0.0, 0.0, 1.0, 1.0]

    def test_without_pooling_only_what_starts_at_a_state_speaks_for_it(self):
        tree, evidence = self.evidence()
        evidence.add_continuation(ROOT, (1, 2, 9), RIGHT)
        assert evidence.of(tree.path(0)[1], pool=False) == []
        assert evidence.of(ROOT, pool=False) == [1.0]

    def test_failed_gradings_are_no_samples(self):
        tree = tree_of((1, 2), (1, 3))
        evidence = Evidence(tree)
        evidence.add_trajectory(0, FAILED)
        evidence.add_continuation(ROOT, (1, 2), FAILED)
        assert evidence.of(ROOT) == []
        assert evidence.outcome(0) is None

    def test_neighbours_tell_nothing_that_speaks_for_the_state_itself(self):
        tree, evidence = self.evidence()
        after_one = tree.path(0)[1]
        evidence.add_continuation(ROOT, (7, 7, 7), RIGHT)
        evidence.add_continuation(ROOT, (1, 7, 7), RIGHT)
        assert evidence.of_neighbours(after_one) == [1.0]

    def test_the_baseline_of_a_continuation_leaves_it_out(self):
        tree = tree_of((1, 2))
        evidence = Evidence(tree)
        for reward in (RIGHT, WRONG, WRONG):
            evidence.add_continuation(ROOT, (3,), reward)
        assert evidence.baseline(ROOT, RIGHT, pool=False) == 0.0
        assert evidence.baseline(ROOT, WRONG, pool=False) == 0.5
        assert math.isnan(evidence.baseline(ROOT, FAILED, pool=False))

    def test_a_lone_continuation_has_no_baseline(self):
        evidence = Evidence(tree_of((1, 2)))
        evidence.add_continuation(ROOT, (3,), RIGHT)
        assert math.isnan(evidence.baseline(ROOT, RIGHT, pool=False))


class TestStateValue:
    def test_by_hand(self):
        value = state_value(4, [1.0, 0.0, 1.0])
        assert value.mean == pytest.approx(2 / 3)
        # variance (1/9 + 4/9 + 1/9) / 2 = 1/3, of the mean 1/9
        assert value.stderr == pytest.approx(1 / 3)
        assert (value.boundary, value.count) == (4, 3)

    def test_without_rewards_it_is_unknown(self):
        unknown = state_value(0, [])
        assert unknown.count == 0
        assert math.isnan(unknown.mean)

    @given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30))
    def test_binary_rewards_have_the_binomial_error(self, rewards):
        value = state_value(0, rewards)
        p, n = sum(rewards) / len(rewards), len(rewards)
        assert value.mean == pytest.approx(p)
        assert value.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


SEARCHING = {"closing": "states", "pooling": "passing", "num_continuations": 4, "token_budget": 50}


def adaptive(completions, rewards, **config):
    tree = tree_of(*completions)
    evidence = Evidence(tree)
    for index, reward in enumerate(rewards):
        evidence.add_trajectory(index, reward)
    return tree, evidence, AdaptiveEstimator(AdaptiveValues(**SEARCHING | config), tree, evidence)


def chain_tokens(wrong_from: int, own: int) -> tuple[int, ...]:
    """Eight segments; what comes from `wrong_from` on is this completion's own."""
    return (*range(1, wrong_from + 1), *(100 * own + k for k in range(wrong_from, 8)))


class TestAdaptive:
    def test_false_agreement_by_hand(self):
        # one test, one sample: p (1 - p)^2 is largest at p = 1/3
        assert false_agreement(1, 1) == pytest.approx(4 / 27, abs=1e-5)
        # p (1 - p)^(n + 1) is largest at p = 1/(n + 2)
        assert false_agreement(4, 1) == pytest.approx(1 / 6 * (5 / 6) ** 5, abs=1e-5)

    def test_the_fewest_samples_that_keep_the_bias_are_taken(self):
        for segments, tests in ((1, 1), (2, 2), (5, 4), (8, 4), (9, 5)):
            assert count_tests("states", segments) == tests
            samples = samples_to_close(0.1, tests)
            assert false_agreement(samples, tests) <= 0.1 < false_agreement(samples - 1, tests)

    @pytest.mark.parametrize("reward", [RIGHT, WRONG])
    def test_a_group_whose_rewards_are_all_equal_costs_nothing(self, reward):
        completions = [chain_tokens(3, own) for own in range(8)]
        _, _, estimator = adaptive(completions, [reward] * 8)
        assert estimator.plan() == {}
        assert [estimator.closed_from(index) for index in range(8)] == [0] * 8

    def test_too_few_equal_rewards_are_not_enough(self):
        _, _, estimator = adaptive([chain_tokens(3, 0), chain_tokens(3, 1)], [WRONG, WRONG])
        needed = samples_to_close(0.15, count_tests("states", 8))
        assert estimator.plan() == {ROOT: needed - 1}  # the other completion is a sample already

    def test_groups_are_closed_whole_or_not_at_all(self):
        completions = [chain_tokens(3, own) for own in range(8)]
        _, _, decided = adaptive(completions, [WRONG] * 8, closing="groups")
        assert decided.plan() == {}
        _, _, open_one = adaptive(completions, [WRONG] * 7 + [RIGHT], closing="groups")
        assert open_one.plan() != {}
        assert open_one.plan() == {}  # one round
        assert [open_one.closed_from(index) for index in range(8)] == [8] * 8

    def test_backed_up_states_that_the_policy_is_sure_to_go_on_from_need_no_samples(self):
        sure, unsure = math.log(0.999), math.log(0.5)
        tree = StateTree(2)
        for index, tokens in enumerate([(1, 2, 3), (4, 5, 6)]):
            tree.add(index, tokens, (unsure, unsure, sure), (0, 1, 2, 3))
        evidence = Evidence(tree)
        evidence.add_trajectory(0, RIGHT)
        evidence.add_trajectory(1, WRONG)
        estimator = AdaptiveEstimator(AdaptiveValues(token_budget=50), tree, evidence)
        asked = estimator.plan()
        assert not asked.keys() & {tree.path(0)[2], tree.path(1)[2]}
        assert asked.keys() >= {tree.path(0)[1], tree.path(1)[1]}

    def test_with_no_bias_allowed_nothing_is_ever_closed(self):
        tree, _, estimator = adaptive([chain_tokens(3, own) for own in range(8)], [WRONG] * 8, max_bias=0)
        assert set(estimator.plan()) >= {state for state in range(len(tree.states)) if len(tree.passing(state)) == 1}
        assert estimator.closed_from(0) == 8

    def test_the_search_finds_the_segment_that_decided(self):
        # Completion 0 fails from its fourth segment on; whatever starts before that succeeds half of the time.
        rng = random.Random(0)
        completions = [chain_tokens(3, 1), chain_tokens(8, 0), chain_tokens(8, 0), chain_tokens(8, 0)]
        tree, evidence, estimator = adaptive(completions, [WRONG, RIGHT, RIGHT, WRONG])
        while asked := estimator.plan():
            for state, count in asked.items():
                lost = any(token >= 100 for token in tree.states[state].prefix)
                for _ in range(count):
                    evidence.add_continuation(state, (999,), WRONG if lost or rng.random() < 0.5 else RIGHT)
        assert estimator.closed_from(0) == 4
        assert estimator.closed_from(1) == 8

    def test_the_budget_caps_what_is_asked_for(self):
        completions = [chain_tokens(2, own) for own in range(4)]
        for budget in (0.25, 1.0, 3.0):
            rng = random.Random(1)
            tree, evidence, estimator = adaptive(completions, [WRONG, RIGHT] * 2, token_budget=budget)
            cost = tree.remaining_tokens()
            spent = 0.0
            while asked := estimator.plan():
                for state, count in asked.items():
                    spent += count * cost[state]
                    for _ in range(count):
                        evidence.add_continuation(state, (999,), rng.choice([RIGHT, WRONG]))
            assert 0 < spent <= budget * 4 * 8

    def test_a_reward_outside_of_the_range_is_refused_by_name(self):
        _, _, estimator = adaptive([(1, 2), (1, 3)], [Reward(value=2.0), WRONG])
        with pytest.raises(RunError, match=r"values\.reward_range: a reward of 2 lies outside of \[0, 1\]"):
            estimator.plan()

    def test_graded_rewards_close_nothing_inside_of_the_range(self):
        half = Reward(value=0.5)
        _, _, estimator = adaptive([chain_tokens(3, own) for own in range(8)], [half] * 8)
        assert estimator.plan() != {}
        assert estimator.closed_from(0) == 8

    def test_with_graded_rewards_samples_follow_the_sample_variance(self):
        # Two states alike but for what their children's continuations got: equal rewards there, extreme ones here.
        tree, evidence, estimator = adaptive(
            [(1, 2, 3), (4, 5, 6)], [Reward(value=0.5)] * 2, pooling="none", max_bias=0
        )
        for reward in (0.5, 0.5, 0.5, 0.5, 0.5, 0.5):
            evidence.add_continuation(tree.path(0)[2], (9,), Reward(value=reward))
        for reward in (0.0, 1.0, 0.0, 1.0, 0.0, 1.0):
            evidence.add_continuation(tree.path(1)[2], (9,), Reward(value=reward))
        asked = estimator.plan()
        assert asked[tree.path(1)[1]] > asked[tree.path(0)[1]]

    def test_an_ungraded_completion_asks_for_nothing(self):
        tree, _, estimator = adaptive([(1, 2, 3), (4, 5, 6), (4, 7, 8)], [FAILED, WRONG, RIGHT])
        asked = estimator.plan()
        assert not asked.keys() & {state for state in tree.path(0) if tree.passing(state) == [0]}


class TestValuation:
    def test_fixed_asks_for_k_of_every_state_at_once_and_never_again(self):
        valuation = Valuation(FixedValues(num_continuations=3), 1)
        assert valuation.at_once == 3
        assert valuation.plan() == {}
        assert valuation.rounds == 1

    def test_what_came_before_a_state_was_known_counts_for_it(self):
        valuation = Valuation(FixedValues(num_continuations=1, pooling="passing"), 1)
        early = Continuation(trajectory=0, boundary=0, completion=completion((1, 2, 7)), reward=RIGHT)
        valuation.add(ROOT, early)
        valuation.tree.add(0, (1, 2, 3), HALF[:3], (0, 1, 2, 3))
        valuation.add_reward(0, WRONG)
        valuation.plan()
        assert [(v.mean, v.count) for v in valuation.values(0, (0, 1, 2, 3), WRONG)] == [(1.0, 1)] * 3

    @pytest.mark.parametrize("closing", ["groups", "states"])
    def test_closed_states_have_the_completions_own_reward(self, closing):
        group = Chain(n=4, q=0.01).group(AdaptiveValues(closing=closing), random.Random(0))
        assert all(value.closed and (value.mean, value.stderr) == (0, 0) for value in group.trajectories[0].values)
        assert group.trajectories[0].values[0].count == 7
        assert group.cost.closed_states == group.cost.states
        assert group.continuations == ()

    def test_every_continuation_knows_what_the_others_of_its_state_got(self):
        group = Chain(n=1, q=0.5).group(FixedValues(num_continuations=4), random.Random(2), group_size=1)
        total = sum(c.reward.value for c in group.continuations)
        assert [c.baseline for c in group.continuations] == [(total - c.reward.value) / 3 for c in group.continuations]
