"""What goes on which node, on paper."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_rl.config.bundle import LEARNER_RANKS, REWARD_ACTORS, ROLLOUT_ACTORS, Bundle
from ray_rl.config.labels import is_selected
from ray_rl.config.nodes import Node
from ray_rl.fit import Fit, fit

RANK = Bundle(role=LEARNER_RANKS, cpus=1, gpus=1)
ACTOR = Bundle(role=ROLLOUT_ACTORS, cpus=1, gpus=1)
GRADER = Bundle(role=REWARD_ACTORS, cpus=1)


def gpu_node(gpus: int, name: str = "node", **labels: str) -> Node:
    return Node(name=name, cpus=16, gpus=gpus, labels=labels)


def counts(found: Fit, role: str) -> list[int]:
    return [sum(bundle.role == role for bundle in place.bundles) for place in found.places]


@pytest.mark.parametrize(
    ("packing", "ranks", "gpus", "expected"),
    [
        ("pack", 4, [2, 4, 8], [0, 4, 0]),
        ("pack", 6, [2, 4, 2], [2, 4, 0]),
        ("strict_pack", 4, [2, 8, 4], [0, 0, 4]),
        ("strict_pack", 6, [2, 4, 2], [0, 0, 0]),
        ("spread", 3, [2, 4, 8], [1, 1, 1]),
        ("spread", 5, [1, 4], [1, 4]),
    ],
)
def test_the_ranks_are_packed_as_configured(packing, ranks, gpus, expected):
    found = fit([RANK] * ranks, [gpu_node(count) for count in gpus], packing)
    assert counts(found, LEARNER_RANKS) == expected
    assert len(found.left_out) == ranks - sum(expected)


def test_rollout_actors_go_one_by_one_wherever_there_is_room():
    found = fit([ACTOR] * 5 + [RANK] * 2, [gpu_node(4), gpu_node(3)], "strict_pack")
    assert counts(found, LEARNER_RANKS) == [0, 2]
    assert counts(found, ROLLOUT_ACTORS) == [4, 1]
    assert found.left_out == ()


def test_labels_keep_actors_to_their_pools():
    rank = Bundle(role=LEARNER_RANKS, cpus=1, gpus=1, labels={"pool": "learner"})
    actor = Bundle(role=ROLLOUT_ACTORS, cpus=1, gpus=1, labels={"pool": "!learner"})
    nodes = [gpu_node(2, pool="learner"), gpu_node(2, pool="rollout"), gpu_node(1)]
    found = fit([actor] * 4 + [rank], nodes, "pack")
    assert counts(found, LEARNER_RANKS) == [1, 0, 0]
    assert counts(found, ROLLOUT_ACTORS) == [0, 2, 1]
    assert found.left_out == (actor,)


def test_custom_resources_run_out():
    actor = Bundle(role=ROLLOUT_ACTORS, cpus=1, resources={"disk": 0.5})
    nodes = [Node(name="a", cpus=8, resources={"disk": 1}), Node(name="b", cpus=8)]
    found = fit([actor] * 3, nodes, "pack")
    assert counts(found, ROLLOUT_ACTORS) == [2, 0]
    assert len(found.left_out) == 1


def test_who_asks_for_no_labels_leaves_labelled_nodes_to_those_who_do():
    actor = Bundle(role=ROLLOUT_ACTORS, cpus=1, gpus=1, labels={"pool": "rollout"})
    found = fit([RANK, actor], [gpu_node(1, pool="rollout"), gpu_node(4)], "pack")
    assert (counts(found, LEARNER_RANKS), counts(found, ROLLOUT_ACTORS)) == ([0, 1], [1, 0])


def test_nodes_are_added_only_for_what_the_present_ones_do_not_take():
    present, spare = [gpu_node(2, "present")], [gpu_node(4, f"spare-{number}") for number in range(3)]
    assert counts(fit([ACTOR] * 2, present, "pack", spare), ROLLOUT_ACTORS) == [2, 0, 0, 0]
    assert counts(fit([ACTOR] * 7, present, "pack", spare), ROLLOUT_ACTORS) == [2, 4, 1, 0]
    assert counts(fit([RANK] * 4, present, "strict_pack", spare), LEARNER_RANKS) == [0, 4, 0, 0]
    assert counts(fit([RANK, *[ACTOR] * 3, GRADER], present, "pack", spare), ROLLOUT_ACTORS) == [1, 2, 0, 0]


def test_a_thousand_nodes_are_a_matter_of_a_second():
    nodes = [gpu_node(8, f"node-{number}") for number in range(1000)]
    found = fit([RANK] * 2000 + [ACTOR] * 6000 + [GRADER] * 100, nodes, "pack")
    assert found.left_out == ()
    assert sum(counts(found, ROLLOUT_ACTORS)) == 6000


POOLS = st.sampled_from(["a", "b", "c"])
LABELS = st.dictionaries(st.just("pool"), POOLS)
SELECTORS = st.dictionaries(st.just("pool"), st.sampled_from(["a", "!a", "in(a,b)", "!in(b,c)"]))
RESOURCES = st.dictionaries(st.sampled_from(["disk", "net"]), st.sampled_from([0.1, 0.5, 1.0, 2.0]))
NODES = st.builds(
    Node,
    name=st.just("node"),
    cpus=st.sampled_from([0.0, 1.0, 2.5, 8.0]),
    gpus=st.integers(0, 4),
    resources=RESOURCES,
    labels=LABELS,
)
BUNDLES = st.builds(
    Bundle,
    role=st.sampled_from([ROLLOUT_ACTORS, REWARD_ACTORS]),
    cpus=st.sampled_from([0.0, 0.1, 1.0, 2.0]),
    gpus=st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]),
    resources=RESOURCES,
    labels=SELECTORS,
)
RANKS = st.builds(
    lambda bundle, count: [bundle] * count,
    st.builds(
        Bundle,
        role=st.just(LEARNER_RANKS),
        cpus=st.sampled_from([0.5, 1.0]),
        gpus=st.sampled_from([0.0, 1.0]),
        labels=SELECTORS,
    ),
    st.integers(0, 5),
)
PACKINGS = st.sampled_from(["pack", "strict_pack", "spread"])


@settings(max_examples=300)
@given(st.lists(NODES, max_size=5), st.lists(NODES, max_size=3), RANKS, st.lists(BUNDLES, max_size=12), PACKINGS)
def test_nothing_is_overcommitted_lost_or_where_it_does_not_belong(nodes, spare, ranks, others, packing):
    bundles = [*ranks, *others]
    found = fit(bundles, nodes, packing, spare)
    placed = [bundle for place in found.places for bundle in place.bundles]
    assert Counter([*placed, *found.left_out]) == Counter(bundles)
    for place, node in zip(found.places, [*nodes, *spare], strict=True):
        assert place.node is node
        assert sum(bundle.cpus for bundle in place.bundles) <= node.cpus + 1e-6
        for name in {name for bundle in place.bundles for name in bundle.resources}:
            used = sum(bundle.resources.get(name, 0) for bundle in place.bundles)
            assert used <= node.resources.get(name, 0) + 1e-6
        assert all(is_selected(bundle.labels, node.labels) for bundle in place.bundles)
        assert all(share >= -1e-6 for share in place.gpus)
        shares = sum(bundle.gpus for bundle in place.bundles)
        assert sum(1 - share for share in place.gpus) == pytest.approx(shares)
        whole = sum(round(bundle.gpus) for bundle in place.bundles if bundle.gpus >= 1)
        assert sum(abs(share) < 1e-6 for share in place.gpus) >= whole
    for bundle in found.left_out:
        if bundle.role != LEARNER_RANKS or packing != "strict_pack":
            assert not any(place.room(bundle, 1) for place in found.places)
    if packing == "strict_pack":
        assert sum(any(bundle.role == LEARNER_RANKS for bundle in place.bundles) for place in found.places) <= 1
