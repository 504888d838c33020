"""Rewards and state values -> one advantage per completion token (pure).

A failed grading says nothing about its completion: such a trajectory does not train (its tokens leave the loss mask,
and with it every count) and is left out of its group's baseline. A state whose continuations all failed to be graded
has no value: the segments on both its sides become one, which keeps the sum of the advantages exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from ray_rl.types import Trajectory, TrajectoryGroup

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


def segment_advantages(values: Sequence[float], reward: float) -> list[float]:
    """VinePPO: A_k = V(s_{k+1}) - V(s_k), and A of the last segment = R - V(s_{n-1}); gamma = 1 (arXiv 2410.01679).

    The reward comes with the last segment and the terminal state is worth 0, so the sum is R - V(s_0).

    Args:
        values: [n] of the state at which each segment starts.
        reward: R of the finished completion.

    Returns:
        [n]
    """
    return [after - before for before, after in pairwise([*values, reward])]


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


def vineppo_advantages(group: TrajectoryGroup) -> list[TokenAdvantages]:
    """`segment_advantages` of each graded trajectory; [G].

    Raises:
        ValueError: a trajectory without one value per segment.
    """
    return [_valued(trajectory) for trajectory in group.trajectories]


def _valued(trajectory: Trajectory) -> TokenAdvantages:
    segments = len(trajectory.boundaries) - 1
    if len(trajectory.values) != segments:
        raise ValueError(f"{len(trajectory.values)} state values for {segments} segments: vineppo needs one each")
    if trajectory.reward.failure is not None or trajectory.values[0].count == 0:
        return None
    known = [value for value in trajectory.values if value.count > 0]
    per_segment = segment_advantages([value.mean for value in known], trajectory.reward.value)
    return broadcast_to_tokens(per_segment, [*(value.boundary for value in known), trajectory.boundaries[-1]])


ADVANTAGES: Mapping[str, Callable[[TrajectoryGroup], list[TokenAdvantages]]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "vineppo": vineppo_advantages,
}
"""`advantage.kind` -> function of a group."""
