"""Where Ray puts the actors of a recipe: several nodes on this machine, with labels and custom resources of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state
from ray.cluster_utils import Cluster

from actors.reward_actor import create_reward_actors, end_reward_actors
from actors.rollout_client import create_rollout_client
from learner.places import Places
from ray_rl import deadlines
from ray_rl.config import RunConfig, resolve_config
from ray_rl.config.labels import is_selected
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.placement import Demand, rank_homes, shortage, unplaced_rollout_actors
from ray_rl.ray_session import cluster_nodes
from tests.running import SMALL, STEP_SECONDS, trained_steps, training

pytestmark = pytest.mark.integration

SECONDS = 60.0
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
NODES: Sequence[dict[str, Any]] = (
    {"num_cpus": 2, "labels": {"pool": "learner", "n": "1"}},
    {"num_cpus": 1, "labels": {"pool": "rollout", "n": "2"}, "resources": {"disk": 1}},
    {"num_cpus": 1, "labels": {"pool": "rollout", "n": "3"}, "resources": {"disk": 1}},
)
"""Besides a head with one CPU and no labels."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    memory = {"object_store_memory": 100 * 2**20}
    ray_nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory, "_system_config": SYSTEM})
    try:
        for node in NODES:
            ray_nodes.add_node(**node, **memory)
        ray_nodes.wait_for_nodes(SECONDS)
        ray.init(address=ray_nodes.address, log_to_driver=False)
        yield ray_nodes
    finally:
        ray.shutdown()
        ray_nodes.shutdown()


@pytest.fixture(autouse=True)
def joined(cluster: Cluster) -> None:
    """Every test is about this cluster."""


class StandIn:
    """What is started in place of a `RolloutActor`: no engine."""

    def __init__(self, *args: object) -> None:
        pass


@ray.remote
class Rank:
    """What is started in the place of a learner's rank."""


def number_of(handle: Any) -> str | None:
    """The label `n` of an actor's node; None for the head, which has none."""
    deadlines.get(handle.__ray_ready__.remote(), SECONDS, what="an actor to start")
    home = state.actors(handle._actor_id.hex())["Address"]["NodeID"]
    (labels,) = (row["Labels"] for row in ray.nodes() if row["NodeID"] == home)
    return labels.get("n")


def ranks_in(places: Places, count: int) -> list[Any]:
    return [Rank.options(**places.options(rank)).remote() for rank in range(count)]


def numbers(handles: Sequence[Any]) -> list[str | None]:
    return sorted((number_of(handle) for handle in handles), key=str)


def asking(sections: Mapping[str, Any]) -> RunConfig:
    return resolve_config({**sections, "segmentation": {"kind": "lines"}})


def test_ray_means_by_a_selector_what_we_mean() -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def there() -> None:
        pass

    conditions = [
        "learner",
        "!learner",
        "in(learner,rollout)",
        "!in(learner,other)",
        "!other",
        "in(rollout)",
        "nowhere",
    ]
    calls = {
        there.options(label_selector={"n": node["labels"]["n"], "pool": condition}).remote(): is_selected(
            {"pool": condition}, node["labels"]
        )
        for node in NODES
        for condition in conditions
    }
    on_the_head = {
        there.options(label_selector={"n": "!in(1,2,3)", "pool": condition}).remote(): condition.startswith("!")
        for condition in conditions
    }
    expected = calls | on_the_head
    wanted = [call for call, selected in expected.items() if selected]
    deadlines.get(wanted, SECONDS, what="the tasks that have a node")
    ready, waiting = ray.wait(list(expected), num_returns=len(expected), timeout=1)
    assert set(ready) == set(wanted)
    for call in waiting:
        ray.cancel(call)


async def test_each_kind_of_actor_is_where_its_recipe_says() -> None:
    config = asking(
        {
            "reward": {"kind": "math"},
            "reward_actors": {"cpus_per_actor": 1, "labels": {"pool": "!in(learner,rollout)"}},
            "rollout": {"num_actors": 2, "labels": {"pool": "rollout"}, "resources": {"disk": 1}},
            "learner": {"ranks": 2, "labels": {"pool": "learner"}, "packing": "strict_pack"},
        }
    )
    assert shortage(Demand.of(config), cluster_nodes()) == ""
    assert unplaced_rollout_actors(config, cluster_nodes(), 4) == 2
    places = Places(config.learner)
    reward_actors = create_reward_actors(config)
    clients = [
        create_rollout_client(config, "model", "run", index, reward_actors=reward_actors, kind=StandIn)  # type: ignore[arg-type]
        for index in range(2)
    ]
    try:
        await places.ready()
        assert numbers(ranks_in(places, 2)) == ["1", "1"]
        assert numbers([client.handle for client in clients]) == ["2", "3"]
        assert numbers(reward_actors) == [None]
    finally:
        for client in clients:
            ray.kill(client.handle)
        await end_reward_actors(reward_actors)
        places.release()


async def test_reserved_places_are_kept_from_rollout_actors_and_for_ranks_that_start_anew() -> None:
    config = asking({"learner": {"ranks": 2, "packing": "strict_pack"}, "rollout": {"num_actors": 3}})
    places = Places(config.learner)
    await places.ready()
    clients = [
        create_rollout_client(config, "model", "run", index, reward_actors=(), kind=StandIn)  # type: ignore[arg-type]
        for index in range(4)
    ]
    try:
        first = ranks_in(places, 2)
        assert numbers(first) == ["1", "1"]
        for rank in first:
            ray.kill(rank)
        assert numbers(ranks_in(places, 2)) == ["1", "1"]
        calls = [client.handle.__ray_ready__.remote() for client in clients]
        ready, waiting = ray.wait(calls, num_returns=4, timeout=5)
        assert (len(ready), len(waiting)) == (3, 1)
        places.release()
        deadlines.get(waiting, SECONDS, what="the place of the ranks")
    finally:
        for client in clients:
            ray.kill(client.handle)


async def test_ranks_without_labels_leave_the_nodes_that_others_need() -> None:
    config = asking({"learner": {"ranks": 1}, "rollout": {"num_actors": 1, "cpus_per_actor": 2}})
    places = Places(config.learner, rank_homes(config, cluster_nodes()))
    await places.ready()
    client = create_rollout_client(config, "model", "run", 0, reward_actors=(), kind=StandIn)  # type: ignore[arg-type]
    try:
        assert numbers(ranks_in(places, 1)) != ["1"]
        assert number_of(client.handle) == "1"
    finally:
        ray.kill(client.handle)
        places.release()


async def test_places_that_are_not_there_are_told_in_time() -> None:
    config = asking({"learner": {"ranks": 3, "packing": "strict_pack", "start_timeout": 1}})
    assert shortage(Demand.of(config), cluster_nodes()).startswith(
        "3 of 3 learner ranks (1 CPU; all on one node: learner.packing=strict_pack) find no node; the cluster has"
    )
    places = Places(config.learner)
    with pytest.raises(DeadlineExceeded, match=r"waited 1 s for places for 3 learner ranks, .*learner\.packing"):
        await places.ready()
    places.release()


async def test_a_place_that_is_lost_with_its_node_is_found_anew(cluster: Cluster) -> None:
    config = asking({"learner": {"ranks": 2, "packing": "spread", "labels": {"pool": "in(learner,late)"}}})
    late = {"num_cpus": 1, "labels": {"pool": "late", "n": "4"}, "object_store_memory": 100 * 2**20}
    doomed = cluster.add_node(**late)
    cluster.wait_for_nodes(SECONDS)
    places = Places(config.learner, rank_homes(config, cluster_nodes()))
    await places.ready()
    first = ranks_in(places, 2)
    assert numbers(first) == ["1", "4"]
    cluster.remove_node(doomed, allow_graceful=False)
    deadline = deadlines.Deadline(SECONDS, what="Ray to notice that a node is gone")
    while sum(row["Alive"] for row in ray.nodes()) > 1 + len(NODES):
        deadline.check()
    for rank in first:
        ray.kill(rank)
    await places.ready()
    assert numbers(ranks_in(places, 2)) == ["1", "1"]
    places.release()


def test_a_run_trains_with_its_ranks_packed_and_its_rollout_actor_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    with training(tmp_path / "run") as run:
        run.start(
            "laptop-grpo",
            *SMALL,
            f"ray.address={cluster.address}",
            "learner.ranks=2",
            "learner.packing=strict_pack",
            "rollout.labels.pool=in(learner,rollout)",
            "training.steps=2",
        )
        run.wait_for("the first step", lambda: run.last_step >= 1, STEP_SECONDS)
        living = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
        labels = {row["NodeID"]: row["Labels"] for row in ray.nodes()}
        homes = {
            name: [
                labels[actor["Address"]["NodeID"]].get("pool") for actor in living if actor["ActorClassName"] == name
            ]
            for name in ("LearnerActor", "RolloutActor")
        }
        assert homes == {"LearnerActor": ["learner", "learner"], "RolloutActor": ["rollout"]}
        assert run.wait_for_end(STEP_SECONDS) == 0
    assert trained_steps(tmp_path / "run") == [1, 2]
