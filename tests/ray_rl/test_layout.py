"""How recipes lie on clusters, on paper; the shapes that ship are among them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_rl.cli import app
from ray_rl.config import ConfigError, load_config
from ray_rl.config.cluster_shape import load_shape
from ray_rl.layout import layouts

SHAPES = Path(__file__).resolve().parents[2] / "deploy" / "shapes"
POOLS = ("rollout.labels.pool=rollout", "learner.labels.pool=learner", "learner.packing=strict_pack")


@pytest.mark.parametrize(
    ("recipe", "overrides", "shape"),
    [
        ("laptop-grpo", (), "laptop"),
        ("laptop-vineppo", (), "laptop"),
        ("reasoning-gym", (), "one-node-8-gpus"),
        ("gsm8k-grpo", (), "one-node-8-gpus"),
        ("gsm8k-vineppo", (), "one-node-8-gpus"),
        ("vineppo-paper", (), "one-node-8-gpus"),
        ("gpu-node", (), "one-node-8-gpus"),
        (
            "gpu-node",
            ("rollout.tensor_parallel=2", "rollout.gpus_per_actor=2", "rollout.num_actors=3"),
            "one-node-8-gpus",
        ),
        ("gpu-node", (*POOLS, "rollout.num_actors={min: 8, max: 32}"), "learner-and-rollout-pools"),
    ],
)
def test_recipes_fit_the_shapes_that_they_are_meant_for(recipe, overrides, shape):
    config = load_config(recipe, overrides)
    assert all(layout.left_out == 0 for layout in layouts(config, load_shape(SHAPES / f"{shape}.yaml")))


def test_every_shape_that_ships_can_be_read():
    assert [len(load_shape(file).nodes()) for file in sorted(SHAPES.glob("*.yaml"))] == [1, 3, 1]


def test_a_layout_says_what_is_where_what_is_free_and_what_is_added():
    config = load_config("gpu-node", [*POOLS, "rollout.num_actors={min: 8, max: 40}"])
    first, most = layouts(config, load_shape(SHAPES / "learner-and-rollout-pools.yaml"))
    head, learner, rollout = first.rows
    assert (head.nodes, head.holds, head.free) == ("head", "-", "8 CPU")
    assert (learner.holds, learner.free) == ("2 learner ranks", "94 CPU, 6 GPU")
    assert learner.has == "96 CPU, 8 GPU, ray.io/accelerator-type=H100, pool=learner"
    assert (rollout.nodes, rollout.holds) == ("rollout-1, rollout-2 (added)", "4 rollout actors")
    assert first.additions == ("rollout: 1 of the 7 nodes that an autoscaler may add",)
    assert most.rows[-1].nodes == "rollout-1 to rollout-8 (added): 8 nodes"
    assert (most.rollout_actors, most.left_out) == (40, 8)


def test_what_finds_no_node_is_told_in_a_line_with_the_mend():
    shape = load_shape(SHAPES / "one-node-8-gpus.yaml")
    config = load_config("gpu-node", ["rollout.num_actors=7", "rollout.labels.pool=rollout"])
    with pytest.raises(ConfigError) as caught:
        layouts(config, shape)
    assert str(caught.value).startswith(
        "gpu-node: 7 of 7 rollout actors (1 CPU, 1 GPU, pool=rollout) find no node; "
        "the cluster has a node of 96 CPU, 8 GPU; add nodes, or lower"
    )


def test_the_command_prints_the_layout_and_warns_of_what_the_run_cannot_grow_to():
    shape = str(SHAPES / "learner-and-rollout-pools.yaml")
    call = ["validate", "gpu-node", "--cluster", shape, *POOLS, "rollout.num_actors={min: 8, max: 40}"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0
    assert "2 learner ranks" in done.output
    assert "rollout: 7 of the 7 nodes that an autoscaler may add" in done.output
    assert "warning: 8 of the 40 rollout actors find no node" in done.output
