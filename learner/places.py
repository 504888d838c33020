"""The places of the learner's ranks in the cluster: a placement group of Ray, reserved together and laid out as configured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_rl.config.learner import LearnerConfig, Packing
from ray_rl.config.nodes import NODE_ID_LABEL
from ray_rl.deadlines import DeadlineExceeded, wait

_STRATEGIES: dict[Packing, str] = {"pack": "PACK", "strict_pack": "STRICT_PACK", "spread": "SPREAD"}
_HOMES_SECONDS = 5.0
"""In which Ray places a group on nodes that have room: after that, somebody else is there."""
_LOOK_SECONDS = 5.0
_LOST_SECONDS = 30.0
"""In which Ray finds other places for those that are lost, where there are others that were chosen."""


class Places:
    """Asked for when made, and kept until `release`: ranks that start anew find them free. Where a node is lost, or was taken
    by others, Ray finds another one."""

    def __init__(self, learner: LearnerConfig, homes: Sequence[str] = ()) -> None:
        """Ask for one per rank, without waiting; an autoscaler sees what is asked for.

        Args:
            learner: of the run.
            homes: ids of the nodes that are preferred, by rank; empty: any will do.
        """
        self._learner = learner
        self._prefers = bool(homes) and NODE_ID_LABEL not in learner.labels
        self._group = self._ask(homes if self._prefers else ())

    def _ask(self, homes: Sequence[str]) -> PlacementGroup:
        learner = self._learner
        bundle = {"CPU": learner.cpus_per_rank, "GPU": learner.gpus_per_rank, **learner.resources}
        return placement_group(
            [{name: amount for name, amount in bundle.items() if amount}] * learner.ranks,
            strategy=_STRATEGIES[learner.packing],
            bundle_label_selector=[{**learner.labels, NODE_ID_LABEL: home} for home in homes]
            or [learner.labels] * learner.ranks,
        )

    async def ready(self) -> None:
        """Wait until there are all of them.

        Raises:
            DeadlineExceeded: `learner.start_timeout` passed.
        """
        if self._prefers:
            try:
                await wait(
                    self._group.ready(), _HOMES_SECONDS, what="the nodes that were chosen for the learner's ranks"
                )
                return
            except DeadlineExceeded:
                self.release()
                self._prefers, self._group = False, self._ask(())
        learner = self._learner
        await wait(
            self._group.ready(),
            learner.start_timeout,
            what=f"places for {learner.ranks} learner ranks",
            causes="nodes that would do are taken by others, or yet to come; free them, ask for less (learner.ranks, "
            "learner.labels, learner.packing and their like), or raise learner.start_timeout",
        )

    async def until_lost(self) -> NoReturn:
        """Look after the places as long as nobody stops it.

        Ray says of a node that has just died that all is well there; a rank that was sent to it would be waited for in vain.

        Raises:
            DeadlineExceeded: places are lost, and Ray has found no others.
        """
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await wait(self._group.ready(), _LOST_SECONDS, what="the places of the learner's ranks, which are lost")

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
