"""What the files of deploy/ say, for the tests that hold it against the program, its recipes and what was published."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
import yaml

from ray_rl.cli import app
from ray_rl.config import RunConfig, load_config
from ray_rl.config.nodes import Node
from ray_rl.placement import Demand, shortage

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"

Document = dict[str, Any]
_SUFFIXES = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def documents(file: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def resource(kind: str, file: Path) -> Document:
    """The one document of that kind in a file."""
    (found,) = (document for document in documents(file) if document["kind"] == kind)
    return found


def parsed(words: Sequence[str]) -> Mapping[str, Any]:
    """The options of a command of ray-rl, by the program's own parser, which refuses those that it does not know."""
    name, *rest = words
    return typer.main.get_group(app).commands[name].make_context(name, rest).params


def training(command: str) -> tuple[RunConfig, Mapping[str, Any]]:
    """What an entry point trains, and its options."""
    words = shlex.split(command)
    assert words[:4] == ["exec", "python", "-m", "ray_rl"], f"{command}: jobs begin with exec python -m ray_rl"
    assert words[4] == "train"
    options = parsed(words[4:])
    return load_config(options["recipe"], options["overrides"] or []), options


def quantity(amount: str | int) -> float:
    """A quantity of Kubernetes as a number."""
    number, suffix = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(amount)).groups()
    return float(number) * _SUFFIXES[suffix]


def groups(cluster: Document) -> list[Document]:
    """The head's group, with one replica, and those of the workers."""
    head = {"groupName": "head", "minReplicas": 1, "maxReplicas": 1, **cluster["headGroupSpec"]}
    return [head, *cluster["workerGroupSpecs"]]


def pods(resource: Document) -> Iterator[Document]:
    """The specifications of all pods that a RayCluster or RayJob asks for."""
    spec = resource["spec"]
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]["spec"]
    for group in groups(spec.get("rayClusterSpec", spec)):
        yield group["template"]["spec"]


def node(group: Document, number: int) -> Node:
    """The Ray node that a pod of a group becomes, by the rules of KubeRay: rayStartParams, then the container's limits."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    params = group["rayStartParams"]
    return Node(
        name=f"{group['groupName']}-{number}",
        cpus=float(params.get("num-cpus", math.ceil(quantity(limits["cpu"])))),
        gpus=float(params.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
        memory_gib=quantity(limits["memory"]) / 2**30,
        labels=group.get("labels", {}),
    )


def kubernetes_nodes(cluster: Document, size: str) -> list[Node]:
    """Those of all groups, each of its `minReplicas` or its `maxReplicas`."""
    return [node(group, number) for group in groups(cluster) for number in range(group[size])]


def assert_grows_as_the_recipe_does(config: RunConfig, least: Sequence[Node], most: Sequence[Node]) -> None:
    """The nodes that are always there hold the actors a run begins with, and all that may be there those it may grow to."""
    assert not shortage(Demand.of(config), least)
    assert not shortage(Demand.of(config, rollout_actors=config.rollout.most_actors), most)
