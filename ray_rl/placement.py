"""What a run needs of a Ray cluster, and a clear word when it is not there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from ray_rl.config import RunConfig
from ray_rl.errors import RunError


class PlacementError(RunError):
    """The cluster lacks resources; the message says which, how many, and what to change."""


def required_resources(config: RunConfig, *, with_learner: bool = True) -> dict[str, float]:
    """Ray resources that all actors of a run occupy together; an evaluation has no learner."""
    rollout, learner = config.rollout, config.learner
    ranks = learner.ranks if with_learner else 0
    needed = {
        "CPU": rollout.actors * rollout.cpus_per_actor + ranks * learner.cpus_per_rank,
        "GPU": rollout.actors * rollout.gpus_per_actor + ranks * learner.gpus_per_rank,
    }
    if config.reward.kind != "exact":
        needed["CPU"] += config.reward_actors.actors * config.reward_actors.cpus_per_actor
    return {name: amount for name, amount in needed.items() if amount}


def missing_resources(required: Mapping[str, float], present: Mapping[str, float]) -> dict[str, float]:
    """How much of each resource the cluster lacks."""
    lacking = {name: amount - present.get(name, 0.0) for name, amount in required.items()}
    return {name: amount for name, amount in lacking.items() if amount > 1e-9}


async def wait_for_resources(
    required: Mapping[str, float], present: Callable[[], Mapping[str, float]], timeout: float, interval: float = 2.0
) -> None:
    """Wait until the cluster has what is required (an autoscaler may be adding nodes).

    Args:
        required: resource -> amount.
        present: asks the cluster for its total resources.
        timeout: seconds to wait.
        interval: seconds between questions.

    Raises:
        PlacementError: it still lacks something then.
    """
    deadline = time.monotonic() + timeout
    while lacking := missing_resources(required, present()):
        if time.monotonic() + interval > deadline:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in required.items())
            short = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
            raise PlacementError(
                f"the run needs {wanted}, and the Ray cluster lacks {short} of it (waited {timeout:g} s); add nodes, or "
                "lower rollout.actors, rollout.cpus_per_actor, rollout.gpus_per_actor, learner.ranks or their like"
            )
        await asyncio.sleep(interval)
