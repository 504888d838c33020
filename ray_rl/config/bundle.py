"""What one actor asks of the node that it is placed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What one actor asks for."""

    role: str
    """Plural, for messages: rollout actors, learner ranks, reward actors."""
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Custom resources of the cluster, by name."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What the node's labels must be, in the syntax of Ray's label selectors (`ray_rl.config.labels`)."""

    def __str__(self) -> str:
        """For messages."""
        asked = amounts(self.cpus, self.gpus, self.resources)
        return f"{asked}, {selected(self.labels)}" if self.labels else asked


def amounts(cpus: float, gpus: float, resources: Mapping[str, float]) -> str:
    """Resources in words, as `4 CPU, 1 GPU, 1 fast_disk`; those of which there are none are left out."""
    all_of_them = {"CPU": cpus, "GPU": gpus, **resources}
    return ", ".join(f"{amount:g} {name}" for name, amount in all_of_them.items() if amount) or "no CPU"


def selected(labels: Mapping[str, str]) -> str:
    """Labels, or what is asked of them, in words."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())
