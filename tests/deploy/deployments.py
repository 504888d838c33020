"""What the files of deploy/ say, for the tests that hold it against the program, its recipes and what was published."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

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


def autoscaling(cluster: Document) -> Document:
    """A RayCluster as Ray's autoscaler reads it: a configuration of its cluster launcher."""
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "x"}, "spec": cluster})


def nodes(config: Document, size: str) -> list[Node]:
    """Those that a configuration of the cluster launcher makes: the head, and the `min_workers` or `max_workers` of each type."""
    return [
        Node(
            name=f"{name}-{number}",
            cpus=float(kind["resources"]["CPU"]),
            gpus=float(kind["resources"].get("GPU", 0)),
            memory_gib=kind["resources"].get("memory", 0) / 2**30,
            labels=kind["labels"],
        )
        for name, kind in config["available_node_types"].items()
        for number in range(1 if name == config["head_node_type"] else kind[size])
    ]


def assert_grows_as_the_recipe_does(config: RunConfig, cluster: Document) -> None:
    """The nodes that are always there hold the actors a run begins with, and all that may be there those it may grow to."""
    assert not shortage(Demand.of(config), nodes(cluster, "min_workers"))
    most = Demand.of(config, rollout_actors=config.rollout.most_actors)
    assert not shortage(most, nodes(cluster, "max_workers"))
