"""All actors of a run: started side by side, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.pool import ActorPool, PoolLimits
from actors.reward_actor import create_reward_actors, end_reward_actors, start_reward_actors
from actors.rollout_client import create_rollout_client
from learner.group import LearnerGroup
from ray_rl.config import RunConfig
from ray_rl.launch.prepared import model_source
from ray_rl.placement import Demand, is_own_ray, rank_homes, wait_for_place
from ray_rl.ray_session import cluster_nodes, placement_seconds
from ray_rl.startup import Startup
from ray_rl.weight_file import sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Actors:
    """All actors of a run."""

    pool: ActorPool
    learner: LearnerGroup | None
    """None where nothing is trained."""

    async def stacks(self) -> dict[str, str]:
        """What each process of pool and learner is doing."""
        return {**await self.pool.stacks(), **(await self.learner.stacks() if self.learner else {})}


@asynccontextmanager
async def running_actors(
    config: RunConfig,
    run_id: str,
    startup: Startup,
    *,
    warn: Callable[[str], None],
    with_learner: bool = True,
    step: int = 0,
    logs: Path | None = None,
) -> AsyncIterator[Actors]:
    """All actors of a run, started side by side; ended together, whatever happens."""
    model, rollout = model_source(config), config.rollout
    learner = _learner(config, model, run_id, logs) if with_learner else None
    reward_actors: list[Any] = []
    pool = ActorPool(
        lambda index: create_rollout_client(
            config, model, run_id, index, reward_actors=reward_actors, step=step, logs=logs
        ),
        rollout.least_actors,
        limits=PoolLimits(
            groups_in_flight=rollout.most_groups,
            start_timeout=rollout.start_timeout,
            group_timeout=rollout.group_timeout,
            publish_timeout=config.weights.timeout,
            outage_timeout=rollout.outage_timeout,
            max_attempts=rollout.max_attempts,
        ),
        serves_loaded=not with_learner,
        warn=warn,
    )
    try:
        demand = Demand.of(config, with_learner=with_learner)
        # Beside the requests for the actors: it is those that an autoscaler answers.
        async with asyncio.TaskGroup() as starting:
            starting.create_task(wait_for_place(demand, cluster_nodes, placement_seconds(config)))
            if learner:
                await learner.reserve()  # before other actors take the ranks' places
                starting.create_task(startup.reached_by(learner.begin(), "learner"))
            reward_actors.extend(create_reward_actors(config, logs))
            starting.create_task(startup.reached_by(pool.start(), "engines"))
            graders = start_reward_actors(reward_actors, rollout.start_timeout)
            starting.create_task(startup.reached_by(graders, "reward_actors"))
        yield Actors(pool=pool, learner=learner)
    finally:
        try:
            # The learner first: on each node the last user of the run's files removes them, and it is killed without ado.
            if learner:
                learner.shutdown()
        finally:
            try:
                await pool.shutdown()
            finally:  # also when the user would not wait for the engines
                await end_reward_actors(reward_actors)
                sweep(run_id)


def _learner(config: RunConfig, model: str, run_id: str, logs: Path | None) -> LearnerGroup:
    def homes() -> Sequence[str]:
        return rank_homes(config, cluster_nodes())

    return LearnerGroup(config, model, run_id, may_grow=not is_own_ray(config), logs=logs, homes=homes)
