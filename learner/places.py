"""The places of the learner's ranks in the cluster: a placement group of Ray, reserved together and laid out as configured."""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_rl.config.learner import LearnerConfig, Packing
from ray_rl.deadlines import wait

_STRATEGIES: dict[Packing, str] = {"pack": "PACK", "strict_pack": "STRICT_PACK", "spread": "SPREAD"}


class Places:
    """Asked for when made, and kept until `release`: ranks that start anew find them free. Ray finds others for those that are
    lost with a node."""

    def __init__(self, learner: LearnerConfig) -> None:
        """Ask for one per rank, without waiting; an autoscaler sees what is asked for."""
        bundle = {"CPU": learner.cpus_per_rank, "GPU": learner.gpus_per_rank, **learner.resources}
        self._learner = learner
        self._group = placement_group(
            [{name: amount for name, amount in bundle.items() if amount}] * learner.ranks,
            strategy=_STRATEGIES[learner.packing],
            bundle_label_selector=[learner.labels] * learner.ranks,
        )

    async def ready(self) -> None:
        """Wait until there are all of them.

        Raises:
            DeadlineExceeded: `learner.start_timeout` passed.
        """
        learner = self._learner
        await wait(
            self._group.ready(),
            learner.start_timeout,
            what=f"places for {learner.ranks} learner ranks",
            causes="nodes that would do are taken by others, or yet to come; free them, ask for less (learner.ranks, "
            "learner.labels, learner.packing and their like), or raise learner.start_timeout",
        )

    def options(self, rank: int) -> dict[str, Any]:
        """What Ray must be told to start a rank in its place."""
        learner = self._learner
        return {
            "num_cpus": learner.cpus_per_rank,
            "num_gpus": learner.gpus_per_rank,
            "resources": learner.resources,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
        }

    def release(self) -> None:
        """Give the places back; who is there, Ray kills."""
        remove_placement_group(self._group)
