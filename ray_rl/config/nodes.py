"""A node of a Ray cluster, as far as placement looks at it: there, or only on paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GIB = 2**30
NODE_ID_LABEL = "ray.io/node-id"
"""The label in which Ray keeps a node's id."""
_OWN_FIELDS = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node has in total, and how it is labelled."""

    name: str
    """For messages."""
    cpus: float
    gpus: float = 0.0
    memory_gib: float | None = None
    """What Ray lends to tasks that ask for memory; ours ask for none. None: not known."""
    resources: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Custom resources by name, and those that Ray itself adds (`node:IP`, `accelerator_type:H100`)."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Those of the user, and those that Ray itself adds (`ray.io/...`)."""

    @classmethod
    def of_ray(cls, row: Mapping[str, Any]) -> Node:
        """A node as `ray.nodes()` tells of it."""
        total = row["Resources"]
        memory = total.get("memory")
        return cls(
            name=row.get("NodeName") or row["NodeManagerAddress"],
            cpus=total.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
            memory_gib=None if memory is None else memory / _GIB,
            resources={name: amount for name, amount in total.items() if name not in _OWN_FIELDS},
            labels=dict(row.get("Labels") or {}),
        )
