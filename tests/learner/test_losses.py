import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batches import loss_totals
from learner.losses import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    LossTotals,
    clipped_surrogate,
    kl_estimate,
    kl_k3,
    masked_sum,
    weighted_sum,
)
from ray_rl.types import TrainingSample

TOTALS = LossTotals(tokens=3, sequences=2, max_tokens=4)
MASK = torch.tensor([[True, True, False], [True, False, False]])
ONES = MASK.float()
VALUES = torch.tensor([[1.0, 3.0, 100.0], [6.0, 100.0, 100.0]])


def surrogate(ratio, advantage):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, clipped = clipped_surrogate(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.3
    )
    loss.sum().backward()
    return loss.item(), logprobs.grad.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # capped at 1.3
        (0.5, 2.0, -1.0, False),  # a good token that became rarer: no cap in that direction
        (0.5, -2.0, 1.6, True),  # floor at 0.8
        (1.5, -2.0, 3.0, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, clipped):
    value, gradient, was_clipped = surrogate(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-6)
    assert was_clipped == clipped
    # d(-rho A)/d logp = -rho A where free, nothing where clipped.
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage, rel=1e-6)


def test_kl_estimators_by_hand():
    policy, reference = torch.tensor(-1.0), torch.tensor(-1.5)
    assert KL_ESTIMATORS["k1"](policy, reference).item() == pytest.approx(0.5)
    assert KL_ESTIMATORS["k2"](policy, reference).item() == pytest.approx(0.125)
    assert KL_ESTIMATORS["k3"](policy, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1, rel=1e-6)


def test_k1_and_k3_are_unbiased_for_the_divergence_of_two_distributions():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    divergence = (policy.exp() * (policy - reference)).sum().item()
    for name in ("k1", "k3"):
        expectation = (policy.exp() * KL_ESTIMATORS[name](policy, reference)).sum().item()
        assert expectation == pytest.approx(divergence, rel=1e-5)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative(policy, reference):
    assert kl_k3(torch.tensor(policy), torch.tensor(reference)).item() >= 0


def test_kl_is_clamped():
    policy, reference = torch.tensor([-20.0, -1.0]), torch.tensor([-1.0, -1.0])
    assert kl_estimate(policy, reference, estimator="k3", clamp=10.0).tolist() == [10.0, 0.0]
    assert kl_estimate(policy, reference, estimator="k1", clamp=None).tolist() == [-19.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("token_mean", 10 / 3), ("sequence_mean", (2 + 6) / 2), ("sequence_sum", 10 / 2), ("constant", 10 / 8)],
)
def test_aggregations_by_hand(kind, expected):
    assert AGGREGATIONS[kind](VALUES, MASK, ONES, TOTALS).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Weights 1/2, 2 of 1, 3 and 1 of 6: 12.5 in all; the weights add up to 3.5, their means over sequences to 2.25.
    [
        ("token_mean", 12.5 / 3.5),
        ("sequence_mean", (6.5 / 2 + 6) / 2.25),
        ("sequence_sum", 12.5 / 2.25),
        ("constant", 12.5 / 9),
    ],
)
def test_weighted_aggregations_by_hand(kind, expected):
    samples = [make_sample([True, True, False], [0.5, 2.0, 0.0]), make_sample([True, False, False], [1.0, 0.0, 0.0])]
    weights = torch.tensor([sample.weights for sample in samples])
    totals = loss_totals(samples, max_tokens=4)
    assert AGGREGATIONS[kind](VALUES, MASK, weights, totals).item() == pytest.approx(expected)


def make_sample(mask, weights):
    zeros = (0.0,) * len(mask)
    return TrainingSample(
        token_ids=(0,) * len(mask),
        loss_mask=tuple(mask),
        behavior_logprobs=zeros,
        advantages=zeros,
        weights=tuple(weights),
    )


def random_batch(weighted):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 9, generator=generator)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    mask[3] = False
    weights = torch.rand(7, 9, generator=generator) + 0.1 if weighted else torch.ones(7, 9)
    weights = torch.where(mask, weights, 0.0)
    samples = [make_sample(*row) for row in zip(mask.tolist(), weights.tolist(), strict=True)]
    return values, mask, weights, loss_totals(samples, max_tokens=9)


def test_weights_of_one_give_the_published_means_to_the_last_bit():
    values, mask, weights, totals = random_batch(weighted=False)
    tokens, sequences = int(mask.sum()), int(mask.any(dim=1).sum())
    assert (totals.tokens, totals.sequences) == (tokens, sequences)
    zeroed = torch.where(mask, values, 0.0)
    expected = {
        "token_mean": zeroed.sum() / tokens,
        "sequence_mean": (zeroed.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / sequences,
        "sequence_sum": zeroed.sum() / sequences,
        "constant": zeroed.sum() / (sequences * 9),
    }
    assert expected.keys() == AGGREGATIONS.keys()
    for kind, value in expected.items():
        assert AGGREGATIONS[kind](values, mask, weights, totals).item() == value.item()


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_sequence_of_weight_two_is_the_sequence_twice(kind):
    values, mask, weights, _ = random_batch(weighted=False)
    twice = [0, 0, *range(1, 7)]
    doubled = weights.clone()
    doubled[0] *= 2
    losses = []
    for rows, row_weights in ((list(range(7)), doubled), (twice, weights[twice])):
        samples = [make_sample(*row) for row in zip(mask[rows].tolist(), row_weights.tolist(), strict=True)]
        totals = loss_totals(samples, max_tokens=9)
        losses.append(AGGREGATIONS[kind](values[rows], mask[rows], row_weights, totals).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_microbatches_add_up_to_one_big_batch(kind, weighted):
    values, mask, weights, totals = random_batch(weighted)
    whole = AGGREGATIONS[kind](values, mask, weights, totals)
    shares = [
        AGGREGATIONS[kind](values[rows], mask[rows], weights[rows], totals) for rows in ([0, 4], [3], [1, 2, 6], [5])
    ]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_empty_batch_is_zero_and_not_nan(kind):
    totals = loss_totals([make_sample([False] * 3, [0.0] * 3)], max_tokens=4)
    assert AGGREGATIONS[kind](VALUES, torch.zeros_like(MASK), torch.zeros(2, 3), totals).item() == 0.0


def test_infinities_outside_the_mask_reach_neither_value_nor_gradient():
    mask, weights = torch.tensor([[True, False]]), torch.tensor([[0.5, 0.0]])
    for total_of, expected in ((masked_sum, 1.0), (partial(weighted_sum, weights=weights), 0.5)):
        values = torch.tensor([[1.0, math.inf]], requires_grad=True)
        total = total_of(values, mask)
        total.backward()
        assert total.item() == expected
        assert values.grad.tolist() == [[expected, 0.0]]
