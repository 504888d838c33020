"""A cluster on paper: what its file says, and what is said of a wrong one."""

from pathlib import Path

import pytest

from ray_rl.config import ConfigError
from ray_rl.config.cluster_shape import load_shape
from ray_rl.config.nodes import Node

POOLS = """
nodes:
  - {name: head, cpus: 4, memory_gib: 16}
  - {name: rollout, count: 2, max_count: 8, cpus: 16, gpus: 4, gpu: H100, price_per_hour: 12.5,
     labels: {pool: rollout}, resources: {fast_disk: 1}}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "shape.yaml"
    file.write_text(text)
    return file


def test_the_nodes_that_are_there_and_those_that_may_be_added(tmp_path: Path) -> None:
    shape = load_shape(written(tmp_path, POOLS))
    head, *rollout = shape.nodes()
    assert head == Node(name="head", cpus=4, memory_gib=16)
    assert rollout[1] == Node(
        name="rollout-2",
        cpus=16,
        gpus=4,
        resources={"fast_disk": 1},
        labels={"pool": "rollout", "ray.io/accelerator-type": "H100"},
    )
    assert [node.name for node in shape.addable()] == [f"rollout-{number}" for number in range(3, 9)]
    assert shape.kinds[1].price_per_hour == 12.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: [{name: a, cpus: 1, cpu: 3}]", r"nodes\.0\.cpu: unknown key; known ones are name, count, max_count"),
        ("nodes: [{name: a}]", r"nodes\.0\.cpus: is required"),
        ("nodes: []", r"nodes: there is none; name at least one"),
        ("nodes: [{name: a, cpus: 1, gpus: 0.5}]", r"nodes\.0\.gpus: .* integer"),
        ("nodes: [{name: a, cpus: .inf}]", r"nodes\.0\.cpus: .* finite"),
        ("nodes: [{name: a, cpus: 1, count: 2, max_count: 1}]", r"nodes\.0: max_count: 1 is less than count = 2"),
        ("nodes: [{name: a, cpus: 1, gpu: H100}]", r"nodes\.0: gpu: H100, but gpus is 0; say how many"),
        (
            "nodes: [{name: a, cpus: 1, labels: {pool: 'in(a)'}}]",
            r"nodes\.0\.labels: pool: 'in\(a\)' is no label's value",
        ),
        ("nodes: [{name: a, cpus: 1, resources: {GPU: 1}}]", r"nodes\.0\.resources: GPU: is no custom resource"),
        ("nodes: [{name: a, cpus: 1}, {name: a, cpus: 2}]", r"nodes: 2 kinds of node are called a"),
        ("- a", r"a cluster shape is a mapping with a list of nodes, not a list"),
        ("[[", r"not valid YAML"),
    ],
)
def test_a_fault_is_told_with_the_file_and_the_path_in_it(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"^{file}: {said}") as caught:
        load_shape(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cluster shape: .*/none\.yaml cannot be read"):
        load_shape(tmp_path / "none.yaml")
