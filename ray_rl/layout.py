"""How a recipe lies on a cluster, on paper: what goes on which node, what stays free, which nodes an autoscaler adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from ray_rl.config import RunConfig
from ray_rl.config.bundle import described
from ray_rl.config.cluster_shape import ClusterShape
from ray_rl.errors import ConfigError
from ray_rl.fit import Place, fit
from ray_rl.placement import MEND, Demand, shortage, unplaced_rollout_actors


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A node, or several in a row that are alike; in words."""

    nodes: str
    has: str
    holds: str
    free: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Of a run with so many rollout actors."""

    rollout_actors: int
    rows: tuple[Row, ...]
    additions: tuple[str, ...]
    """What an autoscaler has to add, a line for each kind of node."""
    left_out: int = 0
    """Rollout actors that find no node; they wait for one in vain, and the run goes on without."""


def layouts(config: RunConfig, shape: ClusterShape) -> list[Layout]:
    """Of a run as it begins, and, where it may choose (`rollout.num_actors: {min, max}`), with the most rollout actors.

    Raises:
        ConfigError: some actors that it begins with find no node; one line.
    """
    if missing := shortage(Demand.of(config), shape.nodes(), shape.addable()):
        raise ConfigError(f"{config.name}: {missing}; {MEND}")
    sizes = sorted({config.rollout.least_actors, config.rollout.most_actors})
    return [_layout(config, shape, size) for size in sizes]


def _layout(config: RunConfig, shape: ClusterShape, size: int) -> Layout:
    nodes, spare = shape.nodes(), shape.addable()
    left_out = unplaced_rollout_actors(config, [*nodes, *spare], size)
    demand = Demand.of(config, rollout_actors=size - left_out)
    places = [place for place in fit(demand.bundles, nodes, demand.packing, spare).places if place.is_open]
    return Layout(
        rollout_actors=size,
        rows=tuple(_rows(places)),
        additions=tuple(_additions(shape, {place.node.name for place in places if place.is_spare})),
        left_out=left_out,
    )


def _rows(places: list[Place]) -> Iterator[Row]:
    for (has, holds, free), alike in groupby(places, key=_in_words):
        names = [f"{place.node.name} (added)" if place.is_spare else place.node.name for place in alike]
        nodes = ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]}: {len(names)} nodes"
        yield Row(nodes=nodes, has=has, holds=holds, free=free)


def _in_words(place: Place) -> tuple[str, str, str]:
    node = place.node
    counts = Counter(bundle.role for bundle in place.bundles)
    return (
        described(node.cpus, node.gpus, node.resources, node.labels),
        ", ".join(f"{count} {role if count > 1 else role.removesuffix('s')}" for role, count in counts.items()) or "-",
        described(round(place.cpus, 4), round(sum(place.gpus), 4), place.resources, {}),
    )


def _additions(shape: ClusterShape, added: set[str]) -> Iterator[str]:
    for kind in shape.kinds:
        addable = {node.name for node in kind.nodes(first=kind.count + 1, last=kind.most)}
        if addable:
            yield f"{kind.name}: {len(addable & added)} of the {len(addable)} nodes that an autoscaler may add"
