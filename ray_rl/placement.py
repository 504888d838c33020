"""Which Ray a run uses, what it asks of it, and a clear word when that is not there. Imports no Ray."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_rl.config import RunConfig
from ray_rl.config.bundle import LEARNER_RANKS, REWARD_ACTORS, ROLLOUT_ACTORS, Bundle, described
from ray_rl.config.learner import Packing
from ray_rl.config.nodes import NODE_ID_LABEL, Node
from ray_rl.errors import RunError
from ray_rl.fit import fit

_KNOCK_SECONDS = 10.0
MEND = (
    "add nodes, or lower rollout.num_actors, rollout.cpus_per_actor, rollout.gpus_per_actor, learner.ranks, the labels asked for "
    "or their like"
)
"""What helps where actors find no node."""


class PlacementError(RunError):
    """The cluster has no place for some of the run's actors; the message says for which, what there is, and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """All that a run asks of Ray, one bundle per actor."""

    bundles: tuple[Bundle, ...]
    packing: Packing = "pack"
    """Of the learner's ranks."""

    @classmethod
    def of(cls, config: RunConfig, *, with_learner: bool = True, rollout_actors: int | None = None) -> Demand:
        """The actors of a configuration.

        Args:
            config: of the run.
            with_learner: an evaluation has none.
            rollout_actors: how many; unset, as many as the run begins with.
        """
        rollout, learner, reward = config.rollout, config.learner, config.reward_actors
        count = rollout.least_actors if rollout_actors is None else rollout_actors
        ranks = learner.ranks if with_learner else 0
        graders = 0 if config.reward.kind == "exact" else reward.actors  # `exact` runs in place
        rank = Bundle(
            role=LEARNER_RANKS,
            cpus=learner.cpus_per_rank,
            gpus=learner.gpus_per_rank,
            resources=learner.resources,
            labels=learner.labels,
        )
        actor = Bundle(
            role=ROLLOUT_ACTORS,
            cpus=rollout.cpus_per_actor,
            gpus=rollout.gpus_per_actor,
            resources=rollout.resources,
            labels=rollout.labels,
        )
        grader = Bundle(
            role=REWARD_ACTORS, cpus=reward.cpus_per_actor, resources=reward.resources, labels=reward.labels
        )
        return cls(bundles=(rank,) * ranks + (actor,) * count + (grader,) * graders, packing=learner.packing)

    @property
    def plain(self) -> Demand:
        """CPUs and GPUs alone."""
        bundles = tuple(replace(bundle, resources={}, labels={}) for bundle in self.bundles)
        return replace(self, bundles=bundles)

    @property
    def cpus(self) -> float:
        """Ray CPUs in sum."""
        return sum(bundle.cpus for bundle in self.bundles)

    @property
    def gpus(self) -> float:
        """Ray GPUs in sum."""
        return sum(bundle.gpus for bundle in self.bundles)


def unplaced(demand: Demand, nodes: Sequence[Node], spare: Sequence[Node] = ()) -> list[Bundle]:
    """The bundles that find no node, were the nodes empty; `spare` are nodes that an autoscaler may add (`ray_rl.fit`)."""
    return list(fit(demand.bundles, nodes, demand.packing, spare).left_out)


def shortage(demand: Demand, nodes: Sequence[Node], spare: Sequence[Node] = ()) -> str:
    """What finds no node, and what nodes there are, in a sentence; empty when all find one."""
    left_out = Counter(unplaced(demand, nodes, spare))
    if not left_out:
        return ""
    asked = Counter(demand.bundles)
    actors = " and ".join(f"{count} of {asked[one]} {_wanting(one, demand)}" for one, count in left_out.items())
    verb = "finds" if left_out.total() == 1 else "find"
    return f"{actors} {verb} no node; {_nodes_described([*nodes, *spare], demand)}"


def unplaced_rollout_actors(config: RunConfig, nodes: Sequence[Node], size: int) -> int:
    """How many of `size` rollout actors would find no node beside the run's other actors."""
    left_out = unplaced(Demand.of(config, rollout_actors=size), nodes)
    return sum(bundle.role == ROLLOUT_ACTORS for bundle in left_out)


def rank_homes(config: RunConfig, nodes: Sequence[Node]) -> list[str]:
    """Ray's ids of the nodes on which the learner's ranks leave room for all others, a rank each; empty where none do.

    For the most rollout actors that the run may have, if the cluster has room for them.
    """
    for size in (config.rollout.most_actors, config.rollout.least_actors):
        demand = Demand.of(config, rollout_actors=size)
        found = fit(demand.bundles, nodes, demand.packing)
        if not found.left_out:
            return [
                place.node.labels[NODE_ID_LABEL]
                for place in found.places
                for bundle in place.bundles
                if bundle.role == LEARNER_RANKS
            ]
    return []


def no_place(waiting: int, size: int) -> str:
    """For messages: how many of `size` rollout actors wait for a node."""
    return f"the cluster has no place for {waiting} of the {size} at present"


async def wait_for_place(
    demand: Demand, nodes: Callable[[], Sequence[Node]], timeout: float, interval: float = 2.0
) -> None:
    """Wait until the cluster has a place for every actor (an autoscaler may be adding nodes).

    An autoscaler adds nodes for actors that have been asked for: run it beside their start, not before.

    Args:
        demand: of the run.
        nodes: asks the cluster for the total resources of its living nodes.
        timeout: seconds to wait.
        interval: seconds between questions.

    Raises:
        PlacementError: some have no place then.
    """
    deadline = time.monotonic() + timeout
    while missing := shortage(demand, nodes()):
        if time.monotonic() + interval > deadline:
            raise PlacementError(
                f"{missing} (waited {timeout:g} s); {MEND}; or raise ray.placement_timeout where nodes are yet to come"
            )
        await asyncio.sleep(interval)


def is_own_ray(config: RunConfig) -> bool:
    """Whether the run starts a Ray instead of joining one."""
    return config.ray.address == "local" and not any(os.environ.get(name) for name in ("RAY_JOB_ID", "RAY_ADDRESS"))


def cluster_address(config: RunConfig) -> str:
    """What `ray.init` is told to join, for a run without a Ray of its own: host:port, or `auto`."""
    return "auto" if config.ray.address == "local" else config.ray.address


def named_address(config: RunConfig) -> str:
    """As `cluster_address`; where that is `auto` and the environment says what it means, that."""
    address = cluster_address(config)
    return os.environ.get("RAY_ADDRESS") or address if address == "auto" else address


def knock(address: str, seconds: float = _KNOCK_SECONDS) -> None:
    """Raise OSError when nobody listens at host:port, for which Ray itself would wait many minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


def _wanting(bundle: Bundle, demand: Demand) -> str:
    alone = bundle.role != LEARNER_RANKS or demand.packing != "strict_pack"
    return (
        f"{bundle.role} ({bundle})"
        if alone
        else f"{bundle.role} ({bundle}; all on one node: learner.packing=strict_pack)"
    )


def _nodes_described(nodes: Sequence[Node], demand: Demand) -> str:
    """What nodes there are, as far as the demand is concerned with it."""
    resources = {name for bundle in demand.bundles for name in bundle.resources}
    labels = {key for bundle in demand.bundles for key in bundle.labels}
    kinds = Counter(
        described(
            node.cpus,
            node.gpus,
            {name: amount for name, amount in node.resources.items() if name in resources},
            {key: value for key, value in node.labels.items() if key in labels},
        )
        for node in nodes
    )
    if not kinds:
        return "the cluster has no node"
    return "the cluster has " + ", ".join(
        f"a node of {kind}" if count == 1 else f"{count} nodes of {kind} each" for kind, count in kinds.most_common()
    )
