"""A cluster on paper: kinds of nodes, how many there are and how many an autoscaler may add."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from ray_rl.config.labels import CustomResources, Labels
from ray_rl.config.load import explain, text_of
from ray_rl.config.nodes import Node
from ray_rl.config.plain import check_plain, parse_yaml
from ray_rl.config.section import Section
from ray_rl.errors import ConfigError

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""The label that Ray gives to nodes with an accelerator that it knows."""


class NodeKind(Section):
    """Nodes that are alike: a node pool, a worker group."""

    name: str = Field(min_length=1, max_length=63)
    count: int = Field(1, ge=0)
    """Nodes that are there from the start."""
    max_count: int | None = Field(None, ge=1)
    """Up to how many there may be with those that an autoscaler adds. Unset: `count`."""
    cpus: float = Field(ge=0, allow_inf_nan=False)
    """Ray CPUs of each."""
    gpus: int = Field(0, ge=0)
    """GPUs of each."""
    gpu: str | None = None
    """Type of its GPUs as Ray names it, for instance H100; becomes the label `ray.io/accelerator-type`."""
    memory_gib: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Memory of each."""
    labels: Labels = Field(default_factory=dict)
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of each."""
    price_per_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of each, in any currency."""

    @property
    def most(self) -> int:
        """How many there may be."""
        return self.count if self.max_count is None else self.max_count

    @model_validator(mode="after")
    def _agrees(self) -> NodeKind:
        if self.most < self.count:
            raise ValueError(f"max_count: {self.most} is less than count = {self.count}; raise it, or leave it out")
        if self.gpu is not None and not self.gpus:
            raise ValueError(f"gpu: {self.gpu}, but gpus is 0; say how many")
        return self

    def nodes(self, *, first: int = 1, last: int | None = None) -> list[Node]:
        """The nodes numbered so, by default those that are there; a kind that has only one is called as that one."""
        accelerator = {ACCELERATOR_LABEL: self.gpu} if self.gpu else {}
        return [
            Node(
                name=self.name if self.most == 1 else f"{self.name}-{number}",
                cpus=self.cpus,
                gpus=self.gpus,
                memory_gib=self.memory_gib,
                resources=self.resources,
                labels={**accelerator, **self.labels},
            )
            for number in range(first, (self.count if last is None else last) + 1)
        ]


class ClusterShape(Section):
    """A whole cluster on paper."""

    kinds: tuple[NodeKind, ...] = Field(alias="nodes")
    """In the file: `nodes`."""

    @model_validator(mode="after")
    def _agrees(self) -> ClusterShape:
        if not self.kinds:
            raise ValueError("nodes: there is none; name at least one kind of node")
        for name, count in Counter(kind.name for kind in self.kinds).items():
            if count > 1:
                raise ValueError(f"nodes: {count} kinds of node are called {name}; give each a name of its own")
        return self

    def nodes(self) -> list[Node]:
        """Those that are there."""
        return [node for kind in self.kinds for node in kind.nodes()]

    def addable(self) -> list[Node]:
        """Those that an autoscaler may add."""
        return [node for kind in self.kinds for node in kind.nodes(first=kind.count + 1, last=kind.most)]


def load_shape(path: str | Path) -> ClusterShape:
    """Read a cluster's shape.

    Raises:
        ConfigError: unreadable, unknown keys, wrong values; a line each, with the file and the path in it.
    """
    text = text_of(Path(path).expanduser(), "cluster shape")
    data = parse_yaml(text, f"{path}:")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a cluster shape is a mapping with a list of nodes, not a {type(data).__name__}")
    check_plain(data)
    try:
        return ClusterShape.model_validate(data)
    except ValidationError as error:
        known = f"known ones are {', '.join(NodeKind.model_fields)}"
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, f"unknown key; {known}"))) from error
