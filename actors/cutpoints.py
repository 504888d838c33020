"""Cuts where the policy hesitated: after every m-th token that it was uncertain of."""

from __future__ import annotations

import math
from collections.abc import Sequence


def uncertain_cuts(behavior_logprobs: Sequence[float], *, every: int, threshold: float) -> list[int]:
    """Token offsets, ascending and inside [1, T], each directly after the m-th, 2m-th, ... uncertain token.

    The uncertain tokens are U = {t : pi(y_t | s_t) < rho} (SPO-chain, arXiv 2505.23564): the branchings, which later
    rewards may differ by. The segments between the cuts hold m of them each, whatever their lengths. A cut is at t + 1
    for the last of the m, so the tokens up to it decide it. At t the token that is still to be drawn would choose
    whether its own state is valued, which biases the value.

    U is counted from the first token to the last; a caller that drops a cut doesn't change where the next ones are.

    Args:
        behavior_logprobs: [T], natural logs, of the policy that sampled at the temperature it sampled with.
        every: m, at least 1.
        threshold: rho in (0, 1]. Compared in logs, strictly: a token of just this probability isn't uncertain.

    Raises:
        ValueError: `every` or `threshold` out of range.
    """
    if every < 1 or not 0 < threshold <= 1:
        raise ValueError(f"need every >= 1 and 0 < threshold <= 1, got {every=}, {threshold=}")
    bound = math.log(threshold)
    uncertain = [t for t, logprob in enumerate(behavior_logprobs) if logprob < bound]
    return [t + 1 for t in uncertain[every - 1 :: every]]
