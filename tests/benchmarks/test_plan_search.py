import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.plan.rates import read_rates, resolve_rates
from benchmarks.plan.report import as_json, remarks
from benchmarks.plan.room import Room, with_gpus
from benchmarks.plan.search import refine, scaled_batch, search
from ray_rl.config import load_config
from ray_rl.config.bundle import Bundle
from ray_rl.config.cluster_shape import ClusterShape, load_shape
from ray_rl.errors import ConfigError, RunError
from tests.benchmarks.test_plan_simulation import rates_of, recipe

ROOT = Path(__file__).resolve().parents[2]
GPU_RECIPE = {
    "rollout": {"group_size": 4, "max_tokens": 120, "max_sequences": 64, "gpus_per_actor": 1},
    "learner": {"gpus_per_rank": 1},
    "training": {"prompts_per_step": 24, "max_staleness": 1},
}
EVEN = {"tokens_per_second": {1: 100}}
"""An engine that is as fast with one sequence as with many."""


def shape_of(*kinds) -> ClusterShape:
    return ClusterShape.model_validate({"nodes": kinds})


def node(name="gpu", count=1, cpus=64, gpus=8, **more):
    return {"name": name, "count": count, "cpus": cpus, "gpus": gpus} | more


def room_of(shape, *, actor_gpus=1.0, labels=()):
    actor = Bundle(role="rollout actors", cpus=1, gpus=actor_gpus, labels=dict(labels))
    return Room(shape=shape, actor=actor, rank=Bundle(role="learner ranks", cpus=1, gpus=1))


def test_a_cost_says_which_nodes_it_leaves_out():
    config = recipe(**GPU_RECIPE)
    shape = shape_of(node(price_per_hour=36), node("head", cpus=8, gpus=0))
    rates = rates_of(engine=EVEN, learner={"tokens_per_second": 300.0})
    plan = search(config, rates, Room.of(config, shape), steps=1)
    assert plan.cost(plan.best) == pytest.approx(36 * plan.best.step_seconds / 3600)
    assert "the cost leaves out head: give price_per_hour of all nodes" in remarks(plan)
    for priced in (node(), node(price_per_hour=36)):
        assert Room.of(config, shape_of(priced)).without_price == []


def test_the_best_split_is_that_in_which_neither_side_waits():
    """A rank trains three times as fast as an actor samples: of 8 GPUs the learner needs 2."""
    shape = shape_of(node(price_per_hour=36))
    config = recipe(**GPU_RECIPE)
    plan = search(config, rates_of(engine=EVEN, learner={"tokens_per_second": 300.0}), Room.of(config, shape))
    assert (plan.best.split.actors, plan.best.split.ranks) == (6, 2)
    tokens = 24 * 4 * 100
    assert plan.best.step_seconds == pytest.approx(tokens / 600, rel=0.02)
    assert plan.best.rollout_idle == pytest.approx(0, abs=0.02)
    assert plan.best.learner_idle == pytest.approx(0, abs=0.02)
    assert plan.cost(plan.best) == pytest.approx(36 * plan.best.step_seconds / 3600)
    assert {one.split.ranks for one in plan.forecasts} == set(range(1, 8))


def test_a_cluster_without_gpus_is_planned_by_its_cpus():
    plan = search(recipe(), rates_of(), Room.of(recipe(), shape_of(node(cpus=3, gpus=0))))
    assert {(one.split.actors, one.split.ranks) for one in plan.forecasts} == {(1, 2), (2, 1)}
    assert plan.cost(plan.best) is None


def test_ranks_lie_close_together_and_an_actor_within_a_node():
    room = room_of(shape_of(node(count=2)), actor_gpus=4)
    assert [room.most_actors(ranks) for ranks in (1, 4, 5, 8, 9, 12, 13)] == [3, 3, 2, 2, 1, 1, 0]
    assert room.most_ranks == 12


def test_labels_keep_actors_from_nodes_and_ranks_take_those_first():
    shape = shape_of(node("learner", gpus=4), node("rollout", labels={"pool": "rollout"}))
    room = room_of(shape, labels={"pool": "rollout"}.items())
    assert [room.most_actors(ranks) for ranks in (1, 4, 6)] == [8, 8, 6]


def test_a_cluster_grows_by_whole_nodes_in_its_proportion():
    shape = shape_of(node("head", gpus=0), node(count=2), node("small", count=1, gpus=4))
    grown = with_gpus(shape, 40)
    assert [(kind.name, kind.count) for kind in grown.kinds] == [("head", 1), ("gpu", 4), ("small", 2)]
    with pytest.raises(ConfigError, match=r"--gpus: 12 is no multiple .* \(2 x 8 \+ 1 x 4 GPUs\)"):
        with_gpus(shape, 12)
    with pytest.raises(ConfigError, match="no node of the cluster has GPUs"):
        with_gpus(shape_of(node(gpus=0)), 8)


def test_a_batch_grows_with_the_cluster_and_the_optimizer_steps_do_not():
    config = recipe(learner={"minibatch_size": 16})
    grown = scaled_batch(config, 4)
    assert (grown.training.prompts_per_step, grown.minibatch_size) == (32, 64)
    with pytest.raises(ConfigError, match="no whole number"):
        scaled_batch(config, 0.3)


def test_the_search_finds_the_lowest_point_without_trying_all():
    tried = []

    def value(number):
        tried.append(number)
        return abs(number - 613)

    assert refine([1, 250, 500, 750, 1000], value, 1) == 613
    assert len(set(tried)) < 30


def test_what_cannot_be_planned_is_said():
    config = recipe(**GPU_RECIPE)
    with pytest.raises(ConfigError, match=r"no room for one rollout actor .* and one learner rank"):
        search(config, rates_of(), Room.of(config, shape_of(node(gpus=1))))
    parallel = rates_of(engine=EVEN | {"tensor_parallel": 2})
    with pytest.raises(ConfigError, match=r"rates: engine.tensor_parallel: 2, but rollout.tensor_parallel is 1"):
        search(config, parallel, Room.of(config, shape_of(node())))


def test_512_gpus_are_planned_within_seconds():
    rates = resolve_rates(read_rates(ROOT / "benchmarks" / "plan" / "example_rates.yaml"))
    shape = with_gpus(load_shape(ROOT / "deploy" / "shapes" / "one-node-8-gpus.yaml"), 512)
    config = scaled_batch(load_config("gpu-node", ["training.max_staleness=1"]), 64)
    started = time.monotonic()
    plan = search(config, rates, Room.of(config, shape), most_groups=128)
    assert time.monotonic() - started < 120  # 10 s where nothing else runs
    assert plan.best.split.actors + plan.best.split.ranks == 512
    json.dumps(as_json([plan]), allow_nan=False)
    alone = search(load_config("gpu-node"), rates, Room.of(config, shape), most_groups=128)
    assert any("never get a group" in remark for remark in remarks(alone))


def test_the_command_prints_a_plan_and_writes_it(tmp_path):
    shape, result = tmp_path / "shape.yaml", tmp_path / "plan.json"
    shape.write_text("nodes: [{name: laptop, cpus: 4}]")
    numbers = ["engine.tokens_per_second={1: 100, 64: 3000}", "learner.tokens_per_second=3000", "lengths.mean=40"]
    command = [sys.executable, "-m", "ray_rl", "plan", "laptop-grpo", "--cluster", str(shape), "--json", str(result)]
    done = subprocess.run([*command, *(f"--rate={one}" for one in numbers)], capture_output=True, text=True, check=True)
    assert "tokens/step" in done.stdout
    assert done.stderr == ""
    (plan,) = json.loads(result.read_text())["plans"]
    assert {split["actors"] + split["ranks"] for split in plan["splits"]} == {4}
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: plan: no rates; give --from RUN")


def test_a_split_whose_run_would_end_is_left_out_and_said():
    """With one actor a group takes longer than it may."""
    impatient = {"rollout": GPU_RECIPE["rollout"] | {"group_timeout": 100.0}, "training": {"prompts_per_step": 24}}
    config = recipe(**GPU_RECIPE | impatient)
    room = Room.of(config, shape_of(node(gpus=3)))
    plan = search(config, rates_of(engine=EVEN | {"tokens_per_second": {1: 80}}), room)
    assert [one.split.actors for one in plan.forecasts] == [2]
    assert any(
        remark.startswith("with 2 learner ranks the run would end: 3 prompts failed") for remark in remarks(plan)
    )
    with pytest.raises(RunError, match="with no split the run would go on; with 1 ranks: 3 prompts failed"):
        search(config, rates_of(engine=EVEN | {"tokens_per_second": {1: 1}}), room)
