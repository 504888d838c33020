"""What the orchestrator needs of a rollout pool and of a learner. Real ones live in actors/ and learner/."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_rl.types import GroupSummary, Prompt, ScoredSample, StepStats
from ray_rl.weight_manifest import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedGroup:
    """A finished group: an opaque reference to the object and what the driver may know of it."""

    prompt: Prompt
    ref: Any
    """A reference that the learner can resolve (Ray: an ObjectRef of a TrajectoryGroup)."""
    summary: GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """One policy version on its way to the engines."""

    version: int
    payload: Any
    """The transport's own: for the object store, manifest and chunk references; None where the engines have them already."""
    probe: Callable[[], Awaitable[Probe]]
    """What proves them. Asked for when the engines have loaded: on a shared machine they need the cores until then."""


class RolloutPool(Protocol):
    """Rollout actors as one."""

    @property
    def capacity(self) -> int:
        """Groups that the pool works on at once."""

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """Sample, score and value one prompt on the least loaded healthy actor."""

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored completions without values; temperature 0 is greedy."""

    async def publish(self, weights: PublishedWeights) -> dict[str, float]:
        """Bring a version into every engine and prove it. Returns metrics."""


class Learner(Protocol):
    """The ranks of the learner as one."""

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """One training step on the groups of a batch."""

    async def publish(self, version: int) -> PublishedWeights:
        """The current policy as a new version."""

    async def save(self, folder: Path) -> None:
        """Everything a resumed run needs of the learner."""

    async def load(self, folder: Path) -> None:
        """The inverse of `save`."""

    async def export(self, folder: Path) -> None:
        """The policy in Hugging Face format."""
