"""How far estimated values and advantages of one prompt are from the reference (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from benchmarks.values.reference import Estimate

CLEARLY_DIFFERENT = 0.15
"""Two segments are ranked only where the reference tells them apart by this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCompletion:
    """One completion as estimated and as the reference has it; n segments."""

    reward: float
    lengths: Sequence[int]
    """[n] tokens."""
    values: Sequence[float]
    """[n] estimated; nan where a state got no sample."""
    advantages: Sequence[float]
    """[n] estimated."""
    true_values: Sequence[Estimate]
    true_advantages: Sequence[Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptErrors:
    """Of one estimator on one prompt. Squared errors have the reference's own variance taken off, and may fall below 0."""

    advantage: float
    """Mean squared error over tokens."""
    value: float
    """Mean squared error over states, as often as completions pass through them."""
    bias: float
    """Mean of V - true V over the same."""
    bias_to_outcome: float
    """The same, counted positive in the direction of the completion's own reward."""
    ranked: float
    """Share of clearly different pairs of segments that are in the right order, ties half; nan without such a pair."""


def prompt_errors(completions: Sequence[JudgedCompletion]) -> PromptErrors:
    """Over all judged completions of a prompt."""
    advantage_errors = [
        (length, (estimate - true.mean) ** 2 - true.variance)
        for completion in completions
        for length, estimate, true in zip(
            completion.lengths, completion.advantages, completion.true_advantages, strict=True
        )
    ]
    found = [
        (estimate - true.mean, true.variance, 1.0 if completion.reward >= 0.5 else -1.0)
        for completion in completions
        for estimate, true in zip(completion.values, completion.true_values, strict=True)
        if not math.isnan(estimate)
    ]
    return PromptErrors(
        advantage=math.fsum(n * error for n, error in advantage_errors) / sum(n for n, _ in advantage_errors),
        value=_mean([error**2 - variance for error, variance, _ in found]),
        bias=_mean([error for error, _, _ in found]),
        bias_to_outcome=_mean([error * direction for error, _, direction in found]),
        ranked=_ranked(completions),
    )


def _ranked(completions: Sequence[JudgedCompletion]) -> float:
    pairs = [
        (estimate, true.mean)
        for completion in completions
        for estimate, true in zip(completion.advantages, completion.true_advantages, strict=True)
    ]
    scores = [
        0.5 if a == b else float((a > b) == (true_a > true_b))
        for (a, true_a), (b, true_b) in combinations(pairs, 2)
        if abs(true_a - true_b) > CLEARLY_DIFFERENT
    ]
    return _mean(scores)


def rmse(squared: Sequence[float]) -> float:
    """Root mean squared error within a prompt, averaged over prompts; below 0 counts as 0.

    Args:
        squared: [prompts] mean squared errors.
    """
    return _mean([math.sqrt(max(error, 0.0)) for error in squared])


def pooled_rmse(squared: Sequence[float]) -> float:
    """Root of the mean over prompts of the mean squared errors: fair where the reference is too noisy for one prompt."""
    return math.sqrt(max(_mean(squared), 0.0))


def mean_and_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean over prompts and its normal 95 % interval; nans are left out."""
    known = [value for value in values if not math.isnan(value)]
    mean = _mean(known)
    error = math.sqrt(_mean([(value - mean) ** 2 for value in known]) / max(len(known) - 1, 1))
    return mean, (mean - 1.96 * error, mean + 1.96 * error)


def price_at(error: float, points: Sequence[Mapping[str, float]], *, price: str, by: str) -> float:
    """What a method costs at most at a given error: its points interpolated in log-log.

    Its cheapest point's price where even that errs less, and nan where no point errs so little.

    Args:
        error: to be reached.
        points: of one method, from cheap to dear.
        price: the key of a point's cost.
        by: the key of a point's error.
    """
    ordered = sorted(points, key=lambda point: point[price])
    if ordered[0][by] <= error:
        return ordered[0][price]
    for worse, better in pairwise(ordered):
        if worse[by] >= error >= better[by] > 0:
            if worse[by] == better[by]:
                return better[price]
            share = math.log(worse[by] / error) / math.log(worse[by] / better[by])
            return math.exp((1 - share) * math.log(worse[price]) + share * math.log(better[price]))
    return math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
