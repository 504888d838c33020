"""A cluster of several Ray nodes on this machine: nodes go and come while a run that has joined it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from benchmarks.training_process import PARTS, TrainingProcess
from tests.running import SMALL, STEP_SECONDS, audited, command, shared_memory_files, trained_steps, training

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(500)]

STEPS = 60


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A node for the learner and two for a rollout actor each."""
    system = {
        # Groups of a tiny policy are so small that Ray would send them to the driver instead of keeping them on their node.
        "max_direct_call_object_size": 100,
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    ray_nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200 * 2**20, "_system_config": system},
    )
    try:
        yield ray_nodes
    finally:
        ray.shutdown()
        ray_nodes.shutdown()


def rollout_node(cluster: Cluster) -> object:
    return cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)


def test_groups_that_wait_on_a_lost_node_are_sampled_again_and_a_new_node_takes_an_actor(
    cluster: Cluster, tmp_path: Path
) -> None:
    before = shared_memory_files()
    nodes = [rollout_node(cluster) for _ in range(2)]
    cluster.wait_for_nodes(60)
    with training(tmp_path / "run") as run:
        run.start(
            "laptop-grpo",
            *SMALL,
            f"ray.address={cluster.address}",
            "ray.placement_timeout=60",
            "rollout.num_actors=2",
            # No room for one beside the learner.
            "rollout.cpus_per_actor=2",
            f"training.steps={STEPS}",
            "training.max_staleness=1",
            # So that there are steps left when the last engine has started.
            "learner.epochs=12",
            "checkpoint.every=5",
        )
        run.wait_for("two actors to serve", lambda: last(run, "pool/actors") == 2, STEP_SECONDS)

        with halted(learner()):
            run.wait_for("the next groups to wait", lambda: "4 finished groups wait" in status(run), STEP_SECONDS)
            cluster.remove_node(nodes[0], allow_graceful=False)
        run.wait_for("lost groups", lambda: "gone with the node they lay on" in run.printed, STEP_SECONDS)
        run.wait_for("one actor to serve", lambda: last(run, "pool/actors") == 1, STEP_SECONDS)

        rollout_node(cluster)
        run.wait_for("the other actor's replacement", lambda: last(run, "pool/actors") == 2, STEP_SECONDS)
        rollout_node(cluster)
        assert "3 rollout actors" in command("scale", str(run.folder), "3")
        run.wait_for("three actors to serve", lambda: last(run, "pool/actors") == 3, STEP_SECONDS)
        assert "1 rollout actor" in command("scale", str(run.folder), "1")
        run.wait_for("one actor to be left", lambda: last(run, "pool/actors") == 1, STEP_SECONDS)

        assert run.wait_for_end(STEP_SECONDS) == 0
        assert run.survivors(20) == []
    assert shared_memory_files() <= before
    assert trained_steps(run.folder) == list(range(1, STEPS + 1))
    assert audited(run.folder).trained == 4 * STEPS


def learner() -> psutil.Process:
    """Below the cluster, and so below this process."""
    below = psutil.Process().children(recursive=True)
    (found,) = (one for one in below if " ".join(one.cmdline()).startswith(PARTS["learner"]))
    return found


@contextmanager
def halted(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def status(run: TrainingProcess) -> str:
    return command("status", str(run.folder))


def last(run: TrainingProcess, metric: str) -> float:
    return run.steps[-1].metrics[metric] if run.steps else 0.0
