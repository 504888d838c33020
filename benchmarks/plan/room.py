"""How many actors and ranks a cluster on paper has room for, what it costs, and how it would be with more GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray_rl.config import RunConfig
from ray_rl.config.bundle import Bundle
from ray_rl.config.cluster_shape import ClusterShape, NodeKind
from ray_rl.config.labels import is_selected
from ray_rl.errors import ConfigError
from ray_rl.placement import Demand

_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A cluster, as a recipe's actors and ranks see it. The nodes are those that are there (`count`)."""

    shape: ClusterShape
    actor: Bundle
    rank: Bundle

    @classmethod
    def of(cls, config: RunConfig, shape: ClusterShape) -> Room:
        """For a recipe."""
        bundles = {bundle.role: bundle for bundle in Demand.of(config).bundles}
        return cls(shape=shape, actor=bundles["rollout actors"], rank=bundles["learner ranks"])

    @property
    def most_ranks(self) -> int:
        """That leave room for an actor at least."""
        ranks = sum(kind.count * _places(kind, self.rank) for kind in self.shape.kinds)
        while ranks and not self.most_actors(ranks):
            ranks -= 1
        return ranks

    def most_actors(self, ranks: int) -> int:
        """Beside so many ranks, which lie as close together as they can, and first where no actor may."""
        actors = 0
        for kind in sorted(self.shape.kinds, key=lambda kind: _places(kind, self.actor) > 0):
            for nodes, ranks_each in _filled(kind.count, _places(kind, self.rank), ranks):
                ranks -= nodes * ranks_each
                actors += nodes * _places(kind, self.actor, beside=self.rank, count=ranks_each)
        return actors if ranks <= 0 else 0

    @property
    def gpus(self) -> int:
        """Of the whole cluster."""
        return gpus_of(self.shape)

    @property
    def price_per_hour(self) -> float | None:
        """Of all nodes that have a price; None where none has."""
        prices = [kind.count * kind.price_per_hour for kind in self.shape.kinds if kind.price_per_hour is not None]
        return sum(prices) if prices else None

    @property
    def without_price(self) -> Sequence[str]:
        """Kinds of nodes that cost something, for others do, and do not say what."""
        priced = self.price_per_hour is not None
        return [kind.name for kind in self.shape.kinds if priced and kind.count and kind.price_per_hour is None]


def gpus_of(shape: ClusterShape) -> int:
    """GPUs of the nodes that are there."""
    return sum(kind.count * kind.gpus for kind in shape.kinds)


def with_gpus(shape: ClusterShape, gpus: int) -> ClusterShape:
    """The cluster with more or fewer of its nodes that have GPUs, in the same proportion.

    Raises:
        ConfigError: the number is none that such nodes have.
    """
    present = gpus_of(shape)
    if not present:
        raise ConfigError("--gpus: no node of the cluster has GPUs; leave it out")
    kinds = [_scaled(kind, gpus, present) if kind.gpus else kind for kind in shape.kinds]
    if sum(kind.count * kind.gpus for kind in kinds) != gpus:
        least = " + ".join(f"{kind.count} x {kind.gpus}" for kind in shape.kinds if kind.gpus)
        raise ConfigError(f"--gpus: {gpus} is no multiple of nodes in the cluster's proportion ({least} GPUs)")
    return shape.model_copy(update={"kinds": tuple(kinds)})


def _scaled(kind: NodeKind, gpus: int, present: int) -> NodeKind:
    return kind.model_copy(update={"count": kind.count * gpus // present, "max_count": None})


def _filled(nodes: int, places: int, wanted: int) -> Iterator[tuple[int, int]]:
    """(nodes, how many each takes): full ones, one that takes the rest, empty ones."""
    full = min(nodes, wanted // places) if places else 0
    rest = min(wanted - full * places, places) if full < nodes else 0
    yield full, places
    if rest:
        yield 1, rest
    yield nodes - full - bool(rest), 0


def _places(kind: NodeKind, bundle: Bundle, *, beside: Bundle | None = None, count: int = 0) -> int:
    """How many of a bundle a node has room for, beside `count` of another."""
    node = next(iter(kind.nodes(first=1, last=1)))
    if not is_selected(bundle.labels, node.labels):
        return 0
    has = {"CPU": node.cpus, "GPU": node.gpus, **node.resources}
    taken = _asked(beside) if beside else {}
    fits = [
        int((has.get(name, 0.0) - count * taken.get(name, 0.0) + _TINY) // amount)
        for name, amount in _asked(bundle).items()
        if amount
    ]
    return max(0, min(fits)) if fits else 0


def _asked(bundle: Bundle) -> Mapping[str, float]:
    return {"CPU": bundle.cpus, "GPU": bundle.gpus, **bundle.resources}


def described(shape: ClusterShape) -> str:
    """The nodes, in a line."""
    return ", ".join(f"{kind.count} {kind.name} ({_has(kind)})" for kind in shape.kinds)


def _has(kind: NodeKind) -> str:
    gpus = f", {kind.gpus} {kind.gpu or 'GPU'}" if kind.gpus else ""
    return f"{kind.cpus:g} CPU{gpus}"
