"""Which node each actor of a run would go to, were the nodes empty: on paper, and so without a promise of Ray's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ray_rl.config.bundle import LEARNER_RANKS, Bundle
from ray_rl.config.labels import is_selected
from ray_rl.config.learner import Packing
from ray_rl.config.nodes import Node

_TINY = 1e-9


@dataclass(kw_only=True)
class Place:
    """A node, what is on it, and what is left. A share of a GPU comes from one GPU, several GPUs are whole ones."""

    node: Node
    is_spare: bool = False
    """Whether the node is yet to be added."""
    bundles: list[Bundle] = field(default_factory=list)
    cpus: float = field(init=False)
    gpus: list[float] = field(init=False)
    """What is left of each."""
    resources: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.cpus = self.node.cpus
        self.gpus = [1.0] * int(self.node.gpus)
        self.resources = dict(self.node.resources)

    @property
    def is_open(self) -> bool:
        """Whether using it costs no further node."""
        return not self.is_spare or bool(self.bundles)

    def room(self, bundle: Bundle, most: int) -> int:
        """How many such bundles still go here, at most so many."""
        if not is_selected(bundle.labels, self.node.labels):
            return 0
        asked = {name: (amount, self.resources.get(name, 0.0)) for name, amount in bundle.resources.items()}
        asked["CPU"] = (bundle.cpus, self.cpus)
        counts = [_times(amount, there) for amount, there in asked.values() if amount]
        if bundle.gpus >= 1:
            counts.append(sum(share >= 1 - _TINY for share in self.gpus) // round(bundle.gpus))
        elif bundle.gpus:
            counts.append(sum(_times(bundle.gpus, share) for share in self.gpus))
        return min([most, *counts])

    def take(self, bundle: Bundle) -> None:
        """Put one here, on the fullest GPUs that will do."""
        least = min(bundle.gpus, 1.0)
        fitting = sorted((share, index) for index, share in enumerate(self.gpus) if share >= least - _TINY)
        for _, index in fitting[: math.ceil(bundle.gpus)]:
            self.gpus[index] -= least
        self.cpus -= bundle.cpus
        for name, amount in bundle.resources.items():
            self.resources[name] -= amount
        self.bundles.append(bundle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Where everything goes."""

    places: tuple[Place, ...]
    """Of every node, in the order that they were given in, spare ones last."""
    left_out: tuple[Bundle, ...]
    """What finds no node."""


def fit(bundles: Sequence[Bundle], nodes: Sequence[Node], packing: Packing, spare: Sequence[Node] = ()) -> Fit:
    """Give each bundle a node.

    What asks for labels or custom resources first, then the largest (by GPUs, then by CPUs; ranks that must be together count
    as one), each kind on the nodes that the fewest other kinds ask for and on which least stays free. It can miss a packing
    that an exhaustive search would find.

    Args:
        bundles: of all actors.
        nodes: those that are there.
        packing: of the learner's ranks.
        spare: those that an autoscaler may add; none is used while one that is there will do.
    """
    places = [*(Place(node=node) for node in nodes), *(Place(node=node, is_spare=True) for node in spare)]
    kinds = Counter(bundles)
    left_out: list[Bundle] = []
    for bundle in sorted(kinds, key=lambda kind: _precedence(kind, kinds[kind], packing), reverse=True):
        share = _SHARES[packing] if bundle.role == LEARNER_RANKS else _one_by_one
        rivals = [other for other in kinds if other.is_choosy and other != bundle]
        left_out += [bundle] * _put(bundle, kinds[bundle], places, share, rivals)
    return Fit(places=tuple(places), left_out=tuple(left_out))


def _precedence(bundle: Bundle, count: int, packing: Packing) -> tuple[bool, float, float, bool]:
    is_rank = bundle.role == LEARNER_RANKS
    together = count if is_rank and packing == "strict_pack" else 1
    return bundle.is_choosy, bundle.gpus * together, bundle.cpus * together, is_rank


Share = Callable[[Sequence[int], int], list[int]]
"""From how many bundles of a kind each node has room for, best node first, and how many there are: how many go to each."""


def _put(bundle: Bundle, count: int, places: Sequence[Place], share: Share, rivals: Sequence[Bundle]) -> int:
    """Put bundles of a kind on nodes; how many find none."""

    def cost(place: Place) -> tuple[bool, int, float, float]:
        wanted = sum(place.room(rival, 1) for rival in rivals)
        return not place.is_open, wanted, sum(place.gpus), place.cpus

    ordered = sorted(places, key=cost)
    candidates = [place for place in ordered if place.is_open]
    shares = share([place.room(bundle, count) for place in candidates], count)
    if sum(shares) < count:
        candidates = ordered
        shares = share([place.room(bundle, count) for place in candidates], count)
    for place, taken in zip(candidates, shares, strict=True):
        for _ in range(taken):
            place.take(bundle)
    return count - sum(shares)


def _one_by_one(rooms: Sequence[int], count: int) -> list[int]:
    """Fill one node after the other."""
    shares = []
    for room in rooms:
        shares.append(min(room, count))
        count -= shares[-1]
    return shares


def _together(rooms: Sequence[int], count: int) -> list[int]:
    """On as few nodes as possible."""
    shares = [0] * len(rooms)
    while rooms and count:
        left = [0 if share else min(room, count) for room, share in zip(rooms, shares, strict=True)]
        most = max(left)
        if not most:
            break
        shares[left.index(most)] = most
        count -= most
    return shares


def _strictly_together(rooms: Sequence[int], count: int) -> list[int]:
    """On one node, or nowhere."""
    shares = [0] * len(rooms)
    for index, room in enumerate(rooms):
        if room >= count:
            shares[index] = count
            break
    return shares


def _apart(rooms: Sequence[int], count: int) -> list[int]:
    """On different nodes, as far as there are."""
    shares = [0] * len(rooms)
    while count and (roomy := [index for index, room in enumerate(rooms) if room > shares[index]]):
        for index in roomy[:count]:
            shares[index] += 1
        count -= len(roomy[:count])
    return shares


_SHARES: dict[Packing, Share] = {"pack": _together, "strict_pack": _strictly_together, "spread": _apart}


def _times(amount: float, there: float) -> int:
    return math.floor((there + _TINY) / amount)
