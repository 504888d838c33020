"""Which Ray a run uses, what it asks of it, and a clear word when that is not there. Imports no Ray."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ray_rl.config import RunConfig
from ray_rl.config.bundle import Bundle, amounts
from ray_rl.config.nodes import Node
from ray_rl.errors import RunError

_KNOCK_SECONDS = 10.0
_TINY = 1e-9
_MEND = "add nodes, or lower rollout.num_actors, rollout.cpus_per_actor, rollout.gpus_per_actor, learner.ranks or their like"


class PlacementError(RunError):
    """The cluster has no place for some of the run's actors; the message says for which, what there is, and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """All that a run asks of Ray, one bundle per actor."""

    bundles: tuple[Bundle, ...]

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
        rank = Bundle(role="learner ranks", cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank)
        actor = Bundle(role="rollout actors", cpus=rollout.cpus_per_actor, gpus=rollout.gpus_per_actor)
        grader = Bundle(role="reward actors", cpus=reward.cpus_per_actor)
        ranks = learner.ranks if with_learner else 0
        graders = 0 if config.reward.kind == "exact" else reward.actors  # `exact` runs in place
        return cls(bundles=(rank,) * ranks + (actor,) * count + (grader,) * graders)

    @property
    def cpus(self) -> float:
        """Ray CPUs in sum."""
        return sum(bundle.cpus for bundle in self.bundles)

    @property
    def gpus(self) -> float:
        """Ray GPUs in sum."""
        return sum(bundle.gpus for bundle in self.bundles)


class _Free:
    """What is left of a node while bundles are put on it. A share of a GPU comes from one GPU, several GPUs are whole ones."""

    def __init__(self, node: Node) -> None:
        self.cpus = node.cpus
        self.gpus = [1.0] * int(node.gpus)

    def devices(self, gpus: float) -> list[int] | None:
        """The GPUs that a bundle would get, the fullest that will do; None when they are not there."""
        least = min(gpus, 1.0) - _TINY
        fitting = sorted((share, index) for index, share in enumerate(self.gpus) if share >= least)
        wanted = max(1, round(gpus)) if gpus else 0
        return [index for _, index in fitting[:wanted]] if len(fitting) >= wanted else None

    def fits(self, bundle: Bundle) -> bool:
        return self.cpus >= bundle.cpus - _TINY and self.devices(bundle.gpus) is not None

    def take(self, bundle: Bundle) -> None:
        for index in self.devices(bundle.gpus) or ():
            self.gpus[index] -= min(bundle.gpus, 1.0)
        self.cpus -= bundle.cpus


def unplaced(demand: Demand, nodes: Sequence[Node]) -> list[Bundle]:
    """The bundles that find no node, were the nodes empty.

    The largest bundle goes first (by GPUs, then by CPUs), each to the node on which least stays free. It can miss a packing
    that an exhaustive search would find; Ray, which takes the actors as they come, would miss it too.
    """
    free = [_Free(node) for node in nodes]
    left_out: list[Bundle] = []
    for bundle in sorted(demand.bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True):
        fitting = [node for node in free if node.fits(bundle)]
        if fitting:
            min(fitting, key=lambda node: (sum(node.gpus), node.cpus)).take(bundle)
        else:
            left_out.append(bundle)
    return left_out


def shortage(demand: Demand, nodes: Sequence[Node]) -> str:
    """What finds no node, and what nodes there are, in a sentence; empty when all find one."""
    left_out = Counter(unplaced(demand, nodes))
    if not left_out:
        return ""
    asked = Counter(demand.bundles)
    actors = " and ".join(f"{count} of {asked[one]} {one.role} ({one})" for one, count in left_out.items())
    verb = "finds" if left_out.total() == 1 else "find"
    return f"{actors} {verb} no node; {_described(nodes)}"


def unplaced_rollout_actors(config: RunConfig, nodes: Sequence[Node], size: int) -> int:
    """How many of `size` rollout actors would find no node beside the run's other actors."""
    left_out = unplaced(Demand.of(config, rollout_actors=size), nodes)
    return sum(bundle.role == "rollout actors" for bundle in left_out)


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
                f"{missing} (waited {timeout:g} s); {_MEND}; or raise ray.placement_timeout where nodes are yet to come"
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


def _described(nodes: Sequence[Node]) -> str:
    kinds = Counter(amounts(node.cpus, node.gpus, {}) for node in nodes)
    if not kinds:
        return "the cluster has no node"
    return "the cluster has " + ", ".join(_described_kinds(kinds))


def _described_kinds(kinds: Counter[str]) -> Iterator[str]:
    for kind, count in kinds.most_common():
        yield f"a node of {kind}" if count == 1 else f"{count} nodes of {kind} each"
