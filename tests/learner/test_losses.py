import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.losses import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    GlobalCounts,
    clipped_surrogate,
    kl_estimate,
    kl_k3,
    masked_sum,
)

COUNTS = GlobalCounts(tokens=3, sequences=2, max_tokens=4)
MASK = torch.tensor([[True, True, False], [True, False, False]])
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
    assert AGGREGATIONS[kind](VALUES, MASK, COUNTS).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_microbatches_add_up_to_one_big_batch(kind):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    mask[3] = False
    counts = GlobalCounts(tokens=int(mask.sum()), sequences=int(mask.any(dim=1).sum()), max_tokens=9)
    whole = AGGREGATIONS[kind](values, mask, counts)
    shares = [AGGREGATIONS[kind](values[rows], mask[rows], counts) for rows in ([0, 4], [3], [1, 2, 6], [5])]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_empty_batch_is_zero_and_not_nan(kind):
    counts = GlobalCounts(tokens=0, sequences=0, max_tokens=4)
    assert AGGREGATIONS[kind](VALUES, torch.zeros_like(MASK), counts).item() == 0.0


def test_infinities_outside_the_mask_reach_neither_value_nor_gradient():
    values = torch.tensor([[1.0, math.inf]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[True, False]]))
    total.backward()
    assert total.item() == 1.0
    assert values.grad.tolist() == [[1.0, 0.0]]
