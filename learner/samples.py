"""Groups -> training samples: which tokens train, by which advantage, with which weight (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from learner.advantages import TokenAdvantages, token_advantages
from ray_rl.types import Completion, TrainingSample, TrajectoryGroup

if TYPE_CHECKING:
    from ray_rl.config.run import RunConfig

VARIANCE_FLOOR = 1e-8
"""Added to the variance when whitening (VinePPO's code)."""


def training_samples(group: TrajectoryGroup, config: RunConfig) -> list[TrainingSample]:
    """One sample per trajectory, in the group's order, then those of the continuations that train.

    A trajectory that does not train keeps its place with an empty loss mask, for the batch is counted in completions.

    Raises:
        ValueError: `vineppo` on a group without state values.
    """
    samples = completion_samples(group, token_advantages(group, config.advantage))
    if config.trains_on_continuations:
        samples += continuation_samples(group)
    threshold = config.learner.loss.confident_above
    if threshold is not None:
        samples = [without_confident_tokens(sample, threshold) for sample in samples]
    return weigh(samples)


def completion_samples(group: TrajectoryGroup, advantages: Sequence[TokenAdvantages]) -> list[TrainingSample]:
    """Prompt and completion of each trajectory; all tokens of the completion train, with weight 1.

    Args:
        group: of G trajectories.
        advantages: [G]; None for a trajectory that does not train.
    """
    prompt = group.prompt.token_ids
    return [
        _sample(prompt, trajectory.completion, of_tokens)
        for trajectory, of_tokens in zip(group.trajectories, advantages, strict=True)
    ]


def continuation_samples(group: TrajectoryGroup) -> list[TrainingSample]:
    """Prompt, prefix and own tokens of each continuation; its own train, with weight 1 and A = r - V(s).

    A continuation is a sample of the policy from a state s whose value is known. V(s) leaves its own reward out
    (`Continuation.baseline`), else A would shrink by (K - 1) / K. One whose baseline is unknown or whose grading
    failed is left out.
    """
    samples = []
    for continuation in group.continuations:
        if math.isnan(continuation.baseline) or continuation.reward.failure is not None:
            continue
        passing = group.trajectories[continuation.trajectory].completion
        advantage = continuation.reward.value - continuation.baseline
        sample = _sample(
            group.prompt.token_ids + passing.token_ids[: continuation.boundary],
            continuation.completion,
            (advantage,) * len(continuation.completion.token_ids),
        )
        samples.append(replace(sample, is_continuation=True))
    return samples


def _sample(prefix: tuple[int, ...], completion: Completion, advantages: TokenAdvantages) -> TrainingSample:
    blank, count = (0.0,) * len(prefix), len(completion.token_ids)
    trains = advantages is not None
    return TrainingSample(
        token_ids=prefix + completion.token_ids,
        loss_mask=(False,) * len(prefix) + (trains,) * count,
        behavior_logprobs=blank + (completion.behavior_logprobs if trains else (0.0,) * count),
        advantages=blank + ((0.0,) * count if advantages is None else advantages),
        weights=blank + (float(trains),) * count,
    )


def without_confident_tokens(sample: TrainingSample, threshold: float) -> TrainingSample:
    """Only tokens that the policy sampled with a probability below the threshold train (SPO, arXiv 2505.23564).

    Where the policy had hardly a choice, an advantage says little about the token. SPO divides by the sum of the mask,
    so the tokens leave every count, too.
    """
    kept = [
        trains and math.exp(logprob) < threshold
        for trains, logprob in zip(sample.loss_mask, sample.behavior_logprobs, strict=True)
    ]

    def pick(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value if stays else 0.0 for value, stays in zip(values, kept, strict=True))

    return replace(
        sample,
        loss_mask=tuple(kept),
        behavior_logprobs=pick(sample.behavior_logprobs),
        advantages=pick(sample.advantages),
        weights=pick(sample.weights),
        confident_tokens=sample.loss_tokens - sum(kept),
    )


def weigh(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Weights that let continuations share the place of the completions of their prompt instead of adding to it.

    n_d samples of the group, g_d of them completions, have a loss token at depth d. Each such token gets

        w = c max(g_d, 1) / n_d,    with c so that all w of the group add up to the loss tokens of the completions

    Else late tokens, which continuations from every boundary reach, would dominate, and prompts with more
    continuations would weigh more (derived). Without continuations every w is exactly 1. A group whose completions
    have no loss token has no place to share: its continuations are left out.

    Args:
        samples: all of one group. They start with the same prompt, so that equal positions are equal depths.
    """
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    reached, by_completions = [0] * longest, [0] * longest
    for sample in samples:
        for position, trains in enumerate(sample.loss_mask):
            reached[position] += trains
            by_completions[position] += trains and not sample.is_continuation
    place = sum(by_completions)
    if place == 0:
        return [sample for sample in samples if not sample.is_continuation]
    scale = place / sum(max(g, 1) for g, n in zip(by_completions, reached, strict=True) if n)
    weight = [scale * max(g, 1) / max(n, 1) for g, n in zip(by_completions, reached, strict=True)]
    return [
        replace(
            sample,
            weights=tuple(w if trains else 0.0 for w, trains in zip(weight, sample.loss_mask, strict=False)),
        )
        for sample in samples
    ]


def whiten(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Advantages shifted and scaled to weighted mean 0 and variance 1 over all loss tokens of the samples.

    (A - m) / sqrt(v + 1e-8), m = sum w A / sum w. v is the unbiased variance for weights that say how much a token
    matters, not how often it was seen (reliability weights):

        v = sum w (A - m)^2 / (sum w - sum w^2 / sum w)

    which does not depend on the weights' scale and for w = 1 has the denominator n - 1 of VinePPO's code. Fewer than
    two loss tokens are returned unchanged.
    """
    flat = loss_token_advantages(samples)
    weights = [w for sample in samples for w, trains in zip(sample.weights, sample.loss_mask, strict=True) if trains]
    if len(flat) < 2:
        return list(samples)
    total = math.fsum(weights)
    mean = math.fsum(w * a for w, a in zip(weights, flat, strict=True)) / total
    squares = math.fsum(w * (a - mean) ** 2 for w, a in zip(weights, flat, strict=True))
    variance = squares / (total - math.fsum(w * w for w in weights) / total)
    scale = 1 / math.sqrt(variance + VARIANCE_FLOOR)
    return [
        replace(
            sample,
            advantages=tuple(
                (a - mean) * scale if trains else 0.0
                for a, trains in zip(sample.advantages, sample.loss_mask, strict=True)
            ),
        )
        for sample in samples
    ]


def loss_token_advantages(samples: Sequence[TrainingSample]) -> list[float]:
    """The advantages of all loss tokens of the samples, in order."""
    return [
        advantage
        for sample in samples
        for advantage, trains in zip(sample.advantages, sample.loss_mask, strict=True)
        if trains
    ]
