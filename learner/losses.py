"""The loss of one microbatch, as its share of one global number: tensors in, tensors out.

Every aggregate divides by a total over the whole minibatch, all microbatches and ranks together, so that adding up the
shares gives the loss of one big batch. Each token enters with its weight w (`TrainingSample.weights`), and the totals
count weights: where all are 1 the aggregates are the published ones. All tensors are [B, L] (sequences, target tokens)
unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTotals:
    """What the losses of a minibatch divide by, over all its microbatches and ranks."""

    tokens: float
    """Sum of w over all loss tokens."""
    sequences: float
    """Sum over the sequences of the mean w of their loss tokens."""
    max_tokens: int
    """Longest completion the run allows; the constant of Dr. GRPO's denominator."""


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss per token: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprobs - old).

    Source: arXiv 1707.06347, equation 7; separate bounds as in DAPO (arXiv 2503.14476).

    Returns:
        The loss, and whether the clipped branch was the smaller one (no gradient flows there), both [B, L].
    """
    ratio = torch.exp(logprobs - old)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, bounded), bounded.detach() < free.detach()


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref: unbiased and of either sign. As a loss term its expected gradient on-policy is zero."""
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased, never negative; on-policy its gradient is that of the divergence."""
    return 0.5 * (logprobs - reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(ref - pol) - (ref - pol) - 1: unbiased, never negative (arXiv 2402.03300, equation 4)."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""`learner.kl.estimator` -> estimate per token of KL(pi || ref) from samples of pi."""


def kl_estimate(logprobs: Tensor, reference: Tensor, *, estimator: str, clamp: float | None) -> Tensor:
    """Estimate per token, bounded above by `clamp` (and below by its negative, which only k1 can reach)."""
    estimate = KL_ESTIMATORS[estimator](logprobs, reference)
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum over the positions of the mask; whatever stands elsewhere, even inf, has no part and no gradient."""
    return torch.where(mask, values, 0.0).sum()


def weighted_sum(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """As `masked_sum`, of w times the values."""
    return (torch.where(mask, values, 0.0) * weights).sum()


def token_mean(values: Tensor, mask: Tensor, weights: Tensor, totals: LossTotals) -> Tensor:
    """Mean over all loss tokens of the minibatch (DAPO, arXiv 2503.14476)."""
    return weighted_sum(values, mask, weights) / _divisor(totals.tokens)


def sequence_mean(values: Tensor, mask: Tensor, weights: Tensor, totals: LossTotals) -> Tensor:
    """Sum of w l over each sequence's loss tokens, divided by their number; then mean (GRPO, arXiv 2402.03300)."""
    weighted = torch.where(mask, values, 0.0) * weights
    per_sequence = weighted.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return per_sequence.sum() / _divisor(totals.sequences)


def sequence_sum(values: Tensor, mask: Tensor, weights: Tensor, totals: LossTotals) -> Tensor:
    """Sum over each sequence's loss tokens, then mean over sequences (the KL term of VinePPO's code)."""
    return weighted_sum(values, mask, weights) / _divisor(totals.sequences)


def constant(values: Tensor, mask: Tensor, weights: Tensor, totals: LossTotals) -> Tensor:
    """Sum over loss tokens, divided by sequences times max_tokens, whatever the lengths (Dr. GRPO, 2503.20783)."""
    return weighted_sum(values, mask, weights) / _divisor(totals.sequences * totals.max_tokens)


def _divisor(total: float) -> float:
    """A minibatch without loss tokens has a loss of 0."""
    return total or 1.0


AGGREGATIONS: Mapping[str, Callable[[Tensor, Tensor, Tensor, LossTotals], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}
"""`learner.loss.aggregation` and `learner.kl.aggregation` -> scalar share of a microbatch in the minibatch's loss."""
