import pytest

from ray_rl.config import resolve_config
from ray_rl.config.bundle import Bundle
from ray_rl.config.nodes import NODE_ID_LABEL, Node
from ray_rl.placement import (
    Demand,
    PlacementError,
    is_own_ray,
    knock,
    rank_homes,
    shortage,
    unplaced,
    unplaced_rollout_actors,
    wait_for_place,
)

BIG = Bundle(role="rollout actors", cpus=1, gpus=2)
SMALL = Bundle(role="learner ranks", cpus=4, gpus=1)


def node(cpus: float, gpus: float = 0) -> Node:
    return Node(name="node", cpus=cpus, gpus=gpus)


def demand(*bundles: Bundle) -> Demand:
    return Demand(bundles=bundles)


def test_each_actor_rank_and_reward_actor_is_a_bundle():
    config = resolve_config(
        {"reward": {"kind": "math"}, "rollout": {"num_actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 1}},
        ["learner.ranks=2", "learner.gpus_per_rank=1", "reward_actors.actors=4"],
    )
    whole = Demand.of(config)
    assert (len(whole.bundles), whole.cpus, whole.gpus) == (9, 3 * 2 + 2 + 4 * 0.5, 5)
    evaluation = Demand.of(config, with_learner=False)
    assert (evaluation.cpus, evaluation.gpus) == (8, 3)


def test_rewards_that_run_in_place_ask_for_nothing():
    assert {bundle.role for bundle in Demand.of(resolve_config({})).bundles} == {"learner ranks", "rollout actors"}


def test_a_run_begins_with_the_fewest_actors_of_its_range():
    config = resolve_config({"rollout": {"num_actors": {"min": 2, "max": 5}}})
    assert len(Demand.of(config).bundles) == 1 + 2
    assert len(Demand.of(config, rollout_actors=5).bundles) == 1 + 5


def test_two_nodes_with_one_gpu_each_have_no_place_for_an_actor_with_two():
    assert unplaced(demand(BIG), [node(8, 1)] * 2) == [BIG]
    assert unplaced(demand(BIG), [node(8, 2)]) == []


def test_the_large_ones_go_first_and_small_ones_fill_the_gaps():
    nodes = [node(8, 2), node(4, 1)]
    assert unplaced(demand(SMALL, BIG), nodes) == []


def test_an_actor_without_gpus_leaves_the_gpu_nodes_processors_alone():
    no_gpu = Bundle(role="reward actors", cpus=1)
    assert unplaced(demand(no_gpu, SMALL), [node(4, 1), node(1)]) == []


def test_shares_of_a_gpu_come_from_one_gpu():
    share = Bundle(role="rollout actors", cpus=0, gpus=0.6)
    assert len(unplaced(demand(share, share, share), [node(0, 2)])) == 1  # 1.8 of 2, but no third GPU has 0.6 left
    half = Bundle(role="rollout actors", cpus=0, gpus=0.5)
    assert unplaced(demand(half, half, SMALL), [node(4, 2)]) == []


def test_tenths_that_do_not_add_up_in_floating_point_still_fit():
    tenth = Bundle(role="reward actors", cpus=0.1)
    assert unplaced(demand(*[tenth] * 10), [node(1)]) == []


def test_the_sentence_names_what_finds_no_node_and_what_nodes_there_are():
    nodes = [node(8, 1), node(2), node(2)]
    assert shortage(demand(SMALL, SMALL, BIG), nodes) == (
        "1 of 1 rollout actors (1 CPU, 2 GPU) and 1 of 2 learner ranks (4 CPU, 1 GPU) find no node; "
        "the cluster has 2 nodes of 2 CPU each, a node of 8 CPU, 1 GPU"
    )
    assert shortage(demand(SMALL), []) == "1 of 1 learner ranks (4 CPU, 1 GPU) finds no node; the cluster has no node"
    assert shortage(demand(SMALL), nodes) == ""


def test_what_scale_asks_for_beyond_the_cluster_is_counted():
    config = resolve_config({})
    assert unplaced_rollout_actors(config, [node(3)], 4) == 2
    assert unplaced_rollout_actors(config, [node(5)], 4) == 0


def test_what_scale_asks_for_goes_where_labels_and_custom_resources_let_it():
    config = resolve_config(
        {
            "rollout": {"labels": {"pool": "rollout"}, "resources": {"disk": 1}},
            "learner": {"labels": {"pool": "!rollout"}},
        }
    )
    rollout = Node(name="rollout", cpus=8, resources={"disk": 2}, labels={"pool": "rollout"})
    assert unplaced_rollout_actors(config, [rollout, node(8)], 4) == 2
    assert shortage(Demand.of(config), [rollout]) == (
        "1 of 1 learner ranks (1 CPU, pool=!rollout) finds no node; the cluster has a node of 8 CPU, 2 disk, pool=rollout"
    )


def test_the_ranks_homes_are_where_they_leave_room_for_the_most_rollout_actors():
    nodes = [
        Node(name=name, cpus=cpus, labels={NODE_ID_LABEL: name}) for name, cpus in {"a": 2, "b": 2, "c": 1}.items()
    ]
    config = resolve_config({"rollout": {"cpus_per_actor": 2, "num_actors": {"min": 1, "max": 2}}})
    assert rank_homes(config, nodes) == ["c"]
    assert rank_homes(config, nodes[:2]) == ["b"]
    assert rank_homes(config, nodes[:1]) == []


async def test_the_error_names_what_is_missing_and_the_mend():
    with pytest.raises(PlacementError, match=r"^1 of 1 rollout .* find.* no node; .*waited 0.02 s.*placement_timeout"):
        await wait_for_place(demand(BIG), lambda: [node(1, 1)], timeout=0.02, interval=0.01)


async def test_nodes_that_join_meanwhile_count():
    answers = iter([[], [node(1, 2)]])
    await wait_for_place(demand(BIG), lambda: next(answers), timeout=1, interval=0.01)
    assert next(answers, None) is None


def test_a_ray_job_joins_its_cluster_although_its_recipe_says_local(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    assert is_own_ray(resolve_config({}))
    assert not is_own_ray(resolve_config({"ray": {"address": "auto"}}))
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert not is_own_ray(resolve_config({}))


def test_nobody_at_the_door_is_known_at_once():
    with pytest.raises(ConnectionRefusedError):
        knock("127.0.0.1:1")
    knock("auto")  # names nobody
