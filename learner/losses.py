"""The loss of one microbatch, as its share of one global number: tensors in, tensors out.

Every aggregate divides by a total over the whole minibatch, all microbatches and ranks together, so that adding up the
shares gives the loss of one big batch. Each token enters with its weight w (`TrainingSample.weights`), and the totals
count weights: where all are 1 the aggregates are the published ones. All tensors are [N], one number per loss token, unless
said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """What N loss tokens count, and whose they are."""

    weights: Tensor
    """[N] w"""
    sequence: Tensor
    """[N] int64: index of the token's sequence in the microbatch."""
    counts: Tensor
    """[S] int64: loss tokens of each sequence, all of which are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTotals:
    """What the losses of a minibatch divide by, over all its microbatches and ranks."""

    tokens: float
    """Sum of w over all loss tokens."""
    sequences: float
    """Sum over the sequences of the mean w of their loss tokens."""
    max_tokens: int
    """Longest completion the run allows; the constant of Dr. GRPO's denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Bounds of the probability ratio."""

    low: float
    """It is clipped below at 1 - low."""
    high: float
    """It is clipped above at 1 + high."""
    dual: float | None = None
    """Where the advantage A is negative, the loss is at most dual |A|; None: no bound."""


def ppo(logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: LossTokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(logprobs - old).

    Source: arXiv 1707.06347, equation 7; separate bounds as in DAPO (arXiv 2503.14476), the dual one of arXiv 1912.09729,
    equation 5.

    Returns:
        The loss, and whether a bound was the smaller (no gradient flows there).
    """
    return _clipped(torch.exp(logprobs - old), advantages, clip)


def gspo(logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: LossTokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """The same with one ratio per sequence, the geometric mean of its tokens': exp(mean of logprobs - old).

    Source: GSPO, arXiv 2507.18071, equations 5 and 7. There, too, `sequence_mean` aggregates.
    """
    sums = torch.zeros(len(tokens.counts), dtype=logprobs.dtype, device=logprobs.device)
    means = sums.index_add(0, tokens.sequence, logprobs - old) / tokens.counts.clamp(min=1)
    return _clipped(torch.exp(means)[tokens.sequence], advantages, clip)


def cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: LossTokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """Clipped importance weights instead of a clipped objective: -clip(rho, 1 - low, 1 + high) A log pi, the weight detached.

    Every token keeps a gradient. Source: CISPO, arXiv 2506.13585, equations 4 and 5 (which leaves the lower bound out: low = 1).

    Returns:
        The loss, and whether the weight was clipped.
    """
    ratio = torch.exp(logprobs - old).detach()
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    return -weight * advantages * logprobs, weight != ratio


def _clipped(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    gain, clipped = torch.minimum(free, bounded), bounded.detach() < free.detach()
    if clip.dual is not None:
        least = torch.where(advantages < 0, clip.dual * advantages, -torch.inf)
        clipped |= gain.detach() < least
        gain = torch.maximum(gain, least)
    return -gain, clipped


SURROGATES: Mapping[str, Callable[[Tensor, Tensor, Tensor, LossTokens, Clip], tuple[Tensor, Tensor]]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}
"""`learner.loss.kind` -> loss per token, before aggregation."""


def importance_weights(old: Tensor, behavior: Tensor, cap: float | None) -> Tensor:
    """min(exp(old - behavior), cap), by which a token's loss is multiplied; 1 without a cap.

    Engine and learner compute log-probabilities differently, and the engine's weights may be older: the weight makes up for
    it. Source: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; as in IMPALA (arXiv 1802.01561).
    """
    if cap is None:
        return torch.ones_like(old)
    return torch.exp(old - behavior).clamp(max=cap).detach()


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


def weighted_sum(values: Tensor, tokens: LossTokens) -> Tensor:
    """Scalar sum of w times the values."""
    return (values * tokens.weights).sum()


def token_mean(values: Tensor, tokens: LossTokens, totals: LossTotals) -> Tensor:
    """Mean over all loss tokens of the minibatch (DAPO, arXiv 2503.14476)."""
    return weighted_sum(values, tokens) / _divisor(totals.tokens)


def sequence_mean(values: Tensor, tokens: LossTokens, totals: LossTotals) -> Tensor:
    """Sum of w l over each sequence's loss tokens, divided by their number; then mean (GRPO, arXiv 2402.03300)."""
    return weighted_sum(values / tokens.counts[tokens.sequence], tokens) / _divisor(totals.sequences)


def sequence_sum(values: Tensor, tokens: LossTokens, totals: LossTotals) -> Tensor:
    """Sum over each sequence's loss tokens, then mean over sequences (the KL term of VinePPO's code)."""
    return weighted_sum(values, tokens) / _divisor(totals.sequences)


def constant(values: Tensor, tokens: LossTokens, totals: LossTotals) -> Tensor:
    """Sum over loss tokens, divided by sequences times max_tokens, whatever the lengths (Dr. GRPO, 2503.20783)."""
    return weighted_sum(values, tokens) / _divisor(totals.sequences * totals.max_tokens)


def _divisor(total: float) -> float:
    """A minibatch without loss tokens has a loss of 0."""
    return total or 1.0


AGGREGATIONS: Mapping[str, Callable[[Tensor, LossTokens, LossTotals], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}
"""`learner.loss.aggregation` and `learner.kl.aggregation` -> scalar share of a microbatch in the minibatch's loss."""
