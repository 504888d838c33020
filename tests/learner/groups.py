"""Short ways to make trajectories, continuations and groups by hand."""

import math

from ray_rl.types import (
    NO_COST,
    Completion,
    Continuation,
    Problem,
    Prompt,
    Reward,
    StateValue,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)

PROMPT = (1, 2)


def make_completion(tokens, logprobs=None):
    """Log-probabilities -0.1, -0.2, ... unless given."""
    return Completion(
        token_ids=tuple(tokens),
        behavior_logprobs=tuple(-0.1 * (k + 1) for k in range(len(tokens))) if logprobs is None else tuple(logprobs),
        versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
        finish_reason="stop",
    )


def make_trajectory(tokens, reward, *, boundaries=None, values=(), failure=None, logprobs=None):
    boundaries = boundaries or (0, len(tokens))
    counts = [3 if value is not None else 0 for value in values]
    return Trajectory(
        completion=make_completion(tokens, logprobs),
        text="",
        reward=Reward(value=reward, failure=failure),
        boundaries=boundaries,
        values=tuple(
            StateValue(boundary=b, mean=math.nan if v is None else v, stderr=0.1, count=n)
            for b, v, n in zip(boundaries, values, counts, strict=False)
        ),
    )


def make_continuation(
    trajectory, boundary, tokens, *, reward=1.0, baseline: float | None = 0.25, failure=None, logprobs=None
):
    """A baseline of None is one that nobody knows."""
    return Continuation(
        trajectory=trajectory,
        boundary=boundary,
        completion=make_completion(tokens, logprobs),
        reward=Reward(value=reward, failure=failure),
        **({} if baseline is None else {"baseline": baseline}),
    )


def make_group(*trajectories, continuations=()):
    return TrajectoryGroup(
        prompt=Prompt(problem=Problem(problem_id="p", prompt="?", answer="!"), position=0, token_ids=PROMPT),
        trajectories=trajectories,
        continuations=tuple(continuations),
        cost=NO_COST,
    )
