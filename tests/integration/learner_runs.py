"""Groups by hand, and configurations of learners that train on them."""

from __future__ import annotations

import random

import ray

from ray_rl.config import RunConfig, resolve_config
from ray_rl.protocols import CollectedGroup
from ray_rl.types import (
    NO_COST,
    Completion,
    GroupSummary,
    Problem,
    Prompt,
    Reward,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)
from tests.tiny_model import VOCABULARY


def make_group(position: int, size: int = 3) -> TrajectoryGroup:
    """The same whenever it is made; its first completion is right."""
    draw = random.Random(position)
    prompt = Prompt(
        problem=Problem(problem_id=f"p{position}", prompt="?", answer="!"),
        position=position,
        token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(4)),
    )
    trajectories = []
    for index in range(size):
        length = draw.randint(2, 14)
        completion = Completion(
            token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(length)),
            behavior_logprobs=(-3.0,) * length,
            versions=(VersionSpan(version=0, start=0, end=length),),
            finish_reason="stop",
        )
        reward = Reward(value=float(index == 0))
        trajectories.append(
            Trajectory(completion=completion, text="", reward=reward, boundaries=(0, length), values=())
        )
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), continuations=(), cost=NO_COST)


def collected(position: int, ref: ray.ObjectRef | None = None) -> CollectedGroup:
    """`make_group(position)` behind a reference; unless one is given, to an object of this process."""
    group = make_group(position)
    summary = GroupSummary(
        prompt_id=group.prompt.prompt_id,
        position=position,
        oldest_version=0,
        newest_version=0,
        rewards=(1.0, 0.0, 0.0),
        lengths=tuple(len(t.completion.token_ids) for t in group.trajectories),
        truncated=0,
        failures=0,
        graded=3,
        segments=3,
        value_mean=float("nan"),
        value_stderr=float("nan"),
        cost=NO_COST,
    )
    return CollectedGroup(prompt=group.prompt, ref=ray.put(group) if ref is None else ref, summary=summary)


def make_config(ranks: int, stage: int, *overrides: str) -> RunConfig:
    """Two epochs of minibatches that the ranks share unequally."""
    return resolve_config(
        {},
        [
            "advantage.kind=grpo",
            "values.kind=none",
            "rollout.group_size=3",
            "training.prompts_per_step=3",
            "learner.optimizer.lr=1e-3",
            # AdamW divides by the root of the second moment: without a floor, rounding noise of gradients that are nearly
            # zero would become whole steps of either sign.
            "learner.optimizer.eps=1e-4",
            "learner.kl.coefficient=0.05",
            f"learner.ranks={ranks}",
            f"learner.zero_stage={stage}",
            "learner.cpus_per_rank=0.5",
            # Minibatches of three sequences: the ranks get unequal shares, and the second one a microbatch of fillers only.
            "learner.minibatch_size=3",
            "learner.epochs=2",
            "learner.microbatch_tokens=16",
            "learner.start_timeout=240",
            "learner.step_timeout=240",
            *overrides,
        ],
    )
