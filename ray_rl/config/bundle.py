"""What one actor asks of the node that it is placed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLLOUT_ACTORS = "rollout actors"
LEARNER_RANKS = "learner ranks"
REWARD_ACTORS = "reward actors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What one actor asks for."""

    role: str
    """Plural, for messages: ROLLOUT_ACTORS, LEARNER_RANKS or REWARD_ACTORS."""
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Custom resources of the cluster, by name."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What the node's labels must be, in the syntax of Ray's label selectors (`ray_rl.config.labels`)."""

    @property
    def is_choosy(self) -> bool:
        """Whether it asks for something that only some nodes have."""
        return bool(self.resources or self.labels)

    def __str__(self) -> str:
        """For messages."""
        return described(self.cpus, self.gpus, self.resources, self.labels)


def described(cpus: float, gpus: float, resources: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """In words, as `4 CPU, 1 GPU, 1 fast_disk, pool=rollout`; what there is none of is left out."""
    amounts = {"CPU": cpus, "GPU": gpus, **resources}
    parts = [f"{amount:g} {name}" for name, amount in amounts.items() if amount] or ["no CPU"]
    return ", ".join([*parts, *(f"{key}={value}" for key, value in labels.items())])
