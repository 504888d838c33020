import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batches import loss_totals, packed_batch
from learner.losses import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    SURROGATES,
    Clip,
    LossTokens,
    LossTotals,
    importance_weights,
    kl_estimate,
    kl_k3,
)
from ray_rl.types import Microbatch, TrainingSample

TOTALS = LossTotals(tokens=3, sequences=2, max_tokens=4)
VALUES = torch.tensor([1.0, 3.0, 6.0])


def tokens_of(counts, weights):
    """Of sequences with so many loss tokens each."""
    counts = torch.tensor(counts)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return LossTokens(weights=torch.tensor(weights), sequence=sequence, counts=counts)


def surrogate(kind, ratios, advantages, counts=None, *, low=0.2, high=0.3, dual=None):
    """Losses of tokens whose old log-probability is -1, their gradients, and which are clipped."""
    old = torch.full((len(ratios),), -1.0)
    logprobs = (torch.tensor(ratios).log() - 1).requires_grad_()
    tokens = tokens_of(counts or [1] * len(ratios), [1.0] * len(ratios))
    clip = Clip(low=low, high=high, dual=dual)
    loss, clipped = SURROGATES[kind](logprobs, old, torch.tensor(advantages), tokens, clip)
    loss.sum().backward()
    return loss.tolist(), logprobs.grad.tolist(), clipped.tolist()


@pytest.mark.parametrize("kind", ["ppo", "gspo"])  # of one token, the sequence's ratio is the token's
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
def test_clipped_surrogate_by_hand(kind, ratio, advantage, loss, clipped):
    (value,), (gradient,), (was_clipped,) = surrogate(kind, [ratio], [advantage])
    assert value == pytest.approx(loss, rel=1e-6)
    assert was_clipped == clipped
    # d(-rho A)/d logp = -rho A where free, nothing where clipped.
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage, rel=1e-6)


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_only():
    losses, gradients, clipped = surrogate("ppo", [5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], dual=3.0)
    assert losses == pytest.approx([3.0, 2.0, -1.3])
    assert gradients == pytest.approx([0.0, 2.0, 0.0])
    assert clipped == [True, False, True]


def test_gspo_takes_the_geometric_mean_of_a_sequences_ratios():
    losses, gradients, clipped = surrogate("gspo", [2.0, 0.5, 1.2, 4.0], [1.0, 1.0, 1.0, 1.0], [3, 1])
    mean = 1.2 ** (1 / 3)
    assert losses == pytest.approx([-mean] * 3 + [-1.3])
    # Each of the three losses is -s A, and s moves by s / 3 with each of the three log-probabilities.
    assert gradients == pytest.approx([-mean] * 3 + [0.0])
    assert clipped == [False, False, False, True]


def test_cispo_clips_weights_and_keeps_every_gradient():
    losses, gradients, clipped = surrogate("cispo", [0.5, 1.1, 3.0], [1.0, -1.0, 2.0], low=1.0, high=0.5)
    assert losses == pytest.approx(
        [-0.5 * (math.log(0.5) - 1), 1.1 * (math.log(1.1) - 1), -1.5 * 2 * (math.log(3) - 1)]
    )
    assert gradients == pytest.approx([-0.5, 1.1, -3.0])
    assert clipped == [False, False, True]


@pytest.mark.parametrize("kind", SURROGATES)
def test_on_policy_every_surrogate_has_the_policy_gradient(kind):
    advantages = [0.5, -2.0, 1.0]
    _, gradients, clipped = surrogate(kind, [1.0, 1.0, 1.0], advantages)
    assert gradients == pytest.approx([-a for a in advantages])
    assert not any(clipped)


def test_importance_weights_are_truncated_and_have_no_gradient():
    old, behavior = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-1.5, -3.0])
    weights = importance_weights(old, behavior, 2.0)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 2.0])
    assert not weights.requires_grad
    assert importance_weights(old, behavior, None).tolist() == [1.0, 1.0]


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
    assert AGGREGATIONS[kind](VALUES, tokens_of([2, 1], [1.0, 1.0, 1.0]), TOTALS).item() == pytest.approx(expected)


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
    totals = loss_totals(samples, max_tokens=4)
    tokens = tokens_of([2, 1], [0.5, 2.0, 1.0])
    assert AGGREGATIONS[kind](VALUES, tokens, totals).item() == pytest.approx(expected)


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
    """Values of 7 sequences' loss tokens, one of them without any; the samples, and their totals."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    mask[3] = False
    weights = torch.rand(7, 9, generator=generator) + 0.1 if weighted else torch.ones(7, 9)
    weights = torch.where(mask, weights, 0.0)
    samples = [make_sample(*row) for row in zip(mask.tolist(), weights.tolist(), strict=True)]
    values = [torch.randn(int(row.sum()), generator=generator) for row in mask]
    return values, samples, loss_totals(samples, max_tokens=9)


def aggregate(kind, values, samples, rows, totals):
    """Of some of the sequences, as one microbatch."""
    tokens = packed_batch(samples, Microbatch(indices=tuple(rows)), torch.device("cpu")).tokens
    return AGGREGATIONS[kind](torch.cat([values[row] for row in rows]), tokens, totals)


def test_weights_of_one_give_the_published_means():
    values, samples, totals = random_batch(weighted=False)
    trained = [of_sequence for of_sequence in values if len(of_sequence)]
    count = sum(map(len, trained))
    assert (totals.tokens, totals.sequences) == (count, 6)
    total = torch.cat(trained).sum()
    expected = {
        "token_mean": total / count,
        "sequence_mean": torch.stack([of_sequence.mean() for of_sequence in trained]).mean(),
        "sequence_sum": total / 6,
        "constant": total / (6 * 9),
    }
    assert expected.keys() == AGGREGATIONS.keys()
    for kind, value in expected.items():
        assert aggregate(kind, values, samples, range(7), totals).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_sequence_of_weight_two_is_the_sequence_twice(kind):
    values, samples, _ = random_batch(weighted=False)
    doubled = [replace(samples[0], weights=tuple(2 * w for w in samples[0].weights)), *samples[1:]]
    twice = [samples[0], *samples]
    losses = [
        aggregate(kind, of, given, range(len(given)), loss_totals(given, max_tokens=9)).item()
        for of, given in ((values, doubled), ([values[0], *values], twice))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_microbatches_add_up_to_one_big_batch(kind, weighted):
    values, samples, totals = random_batch(weighted)
    whole = aggregate(kind, values, samples, range(7), totals)
    shares = [aggregate(kind, values, samples, rows, totals) for rows in ([0, 4], [3], [1, 2, 6], [5])]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_empty_batch_is_zero_and_not_nan(kind):
    samples = [make_sample([False] * 3, [0.0] * 3)]
    assert aggregate(kind, [torch.zeros(0)], samples, [0], loss_totals(samples, max_tokens=4)).item() == 0.0
