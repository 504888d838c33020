"""Rewards and state values -> one advantage per completion token (pure).

A failed grading says nothing about its completion: such a trajectory does not train (its tokens leave the loss mask,
and with it every count) and is left out of its group's baseline. A state whose continuations all failed to be graded
has no value: the segments on both its sides become one, which keeps the sum of the advantages exact where they are not
smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ray_rl.types import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from ray_rl.config.advantage import AdvantageConfig

STD_FLOOR = 1e-6
"""Added to the standard deviation of a group's rewards."""

TokenAdvantages = tuple[float, ...] | None
"""[T], one per completion token; None for a trajectory that does not train."""


def group_relative(rewards: Sequence[float]) -> list[float]:
    """GRPO: (r - mean) / (std + 1e-6), population form (arXiv 2402.03300, section 4.1.2; the floor is ours).

    Args:
        rewards: [G] of the completions of one prompt.

    Returns:
        [G]; zeros when all rewards are equal.
    """
    deviations = centered(rewards)
    if not deviations:
        return []
    std = math.sqrt(math.fsum(d * d for d in deviations) / len(deviations))
    return [d / (std + STD_FLOOR) for d in deviations]


def centered(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO: r - mean, without the division that favours prompts of low variance (arXiv 2503.20783).

    Args:
        rewards: [G] of the completions of one prompt.

    Returns:
        [G]; zeros when all rewards are equal.
    """
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """RLOO: r_i - mean of the other rewards = G / (G - 1) (r_i - mean) (arXiv 2402.14740).

    Args:
        rewards: [G] of the completions of one prompt.

    Returns:
        [G]; zeros when all rewards are equal, and for a single one, which has nothing to be compared with.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    return [deviation * count / (count - 1) for deviation in centered(rewards)]


def segment_advantages(
    values: Sequence[float], reward: float, *, gae_lambda: float = 0.0, baseline_smoothing: float = 0.0
) -> list[float]:
    """A_k = Q_k - B_k: what a segment leads to, less what it starts from; gamma = 1.

    VinePPO (arXiv 2410.01679) takes the values themselves, Q_k = V(s_{k+1}) and B_k = V(s_k). The reward comes with the last
    segment and the terminal state is worth 0, so that Q of the last is R and the sum of all A_k is R - V(s_0).

    An estimate of V(s_{k+1}) from few continuations is noisy, and other numbers tell the same. What comes later on the way
    does, R at last: Q_k = (1 - l) V(s_{k+1}) + l Q_{k+1} (the lambda-return; GAE, arXiv 1506.02438, section 3). And any
    number known before the segment will do as a baseline: B_k = (1 - m) V(s_k) + m B_{k-1}. The expected gradient is the same
    for every l and m (derived: E[Q_k | s_{k+1}] = V(s_{k+1}), and B_k does not depend on the segment). With values known exactly
    0 is best for both; with K independent continuations, each as good as R, l = 1 / (K + 1) for a Q made of one value and R.

    Args:
        values: [n] of the state at which each segment starts.
        reward: R of the finished completion.
        gae_lambda: l.
        baseline_smoothing: m.

    Returns:
        [n]
    """
    targets = [reward]
    for value in reversed(values[1:]):
        targets.append((1 - gae_lambda) * value + gae_lambda * targets[-1])
    baselines = list(values[:1])
    for value in values[1:]:
        baselines.append((1 - baseline_smoothing) * value + baseline_smoothing * baselines[-1])
    return [target - baseline for target, baseline in zip(reversed(targets), baselines, strict=True)]


def broadcast_to_tokens(per_segment: Sequence[float], boundaries: Sequence[int]) -> tuple[float, ...]:
    """Every token takes its segment's advantage; the end-of-sequence token is in the last segment.

    Args:
        per_segment: [n]
        boundaries: [n + 1] token offsets, 0 = b_0 < ... < b_n = T.

    Returns:
        [T]
    """
    lengths = [end - start for start, end in pairwise(boundaries)]
    return tuple(advantage for advantage, length in zip(per_segment, lengths, strict=True) for _ in range(length))


def _compared(group: TrajectoryGroup, rule: Callable[[Sequence[float]], list[float]]) -> list[TokenAdvantages]:
    """One advantage per graded trajectory, by a rule over the graded rewards of the group."""
    graded = [index for index, trajectory in enumerate(group.trajectories) if trajectory.reward.failure is None]
    advantages = rule([group.trajectories[index].reward.value for index in graded])
    result: list[TokenAdvantages] = [None] * len(group.trajectories)
    for index, advantage in zip(graded, advantages, strict=True):
        result[index] = (advantage,) * len(group.trajectories[index].completion.token_ids)
    return result


def grpo_advantages(group: TrajectoryGroup) -> list[TokenAdvantages]:
    """`group_relative` of the group's graded rewards, the same for every token of a trajectory; [G]."""
    return _compared(group, group_relative)


def dr_grpo_advantages(group: TrajectoryGroup) -> list[TokenAdvantages]:
    """`centered` of the group's graded rewards, the same for every token of a trajectory; [G]."""
    return _compared(group, centered)


def rloo_advantages(group: TrajectoryGroup) -> list[TokenAdvantages]:
    """`leave_one_out` of the group's graded rewards, the same for every token of a trajectory; [G]."""
    return _compared(group, leave_one_out)


def vineppo_advantages(
    group: TrajectoryGroup, *, gae_lambda: float = 0.0, baseline_smoothing: float = 0.0
) -> list[TokenAdvantages]:
    """`segment_advantages` of each graded trajectory; [G].

    Raises:
        ValueError: a trajectory without one value per segment.
    """
    rule = partial(segment_advantages, gae_lambda=gae_lambda, baseline_smoothing=baseline_smoothing)
    return [_valued(trajectory, rule) for trajectory in group.trajectories]


def _valued(trajectory: Trajectory, rule: Callable[[Sequence[float], float], list[float]]) -> TokenAdvantages:
    segments = len(trajectory.boundaries) - 1
    if len(trajectory.values) != segments:
        raise ValueError(f"{len(trajectory.values)} state values for {segments} segments: vineppo needs one each")
    if trajectory.reward.failure is not None or trajectory.values[0].count == 0:
        return None
    known = [value for value in trajectory.values if value.count > 0]
    per_segment = rule([value.mean for value in known], trajectory.reward.value)
    return broadcast_to_tokens(per_segment, [*(value.boundary for value in known), trajectory.boundaries[-1]])


ADVANTAGES: Mapping[str, Callable[..., list[TokenAdvantages]]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "vineppo": vineppo_advantages,
}
"""`advantage.kind` -> function of a group and, by keyword, of that kind's own options."""


def token_advantages(group: TrajectoryGroup, config: AdvantageConfig) -> list[TokenAdvantages]:
    """One advantage per completion token of each trajectory, before whitening; [G].

    Raises:
        ValueError: `vineppo` on a group without state values.
    """
    return ADVANTAGES[config.kind](group, **config.model_dump(exclude={"kind", "whiten"}))
