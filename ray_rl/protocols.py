"""What the orchestrator needs of a rollout pool and of a learner. Real ones live in actors/ and learner/."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray_rl.errors import RunError
from ray_rl.inventory import FileEntry
from ray_rl.object_store import Place
from ray_rl.types import GroupSummary, Prompt, ScoredSample, StepStats
from ray_rl.weight_manifest import Probe


class NoActorsLeft(RunError):
    """No rollout actor has been there for `rollout.outage_timeout` seconds; the message says what became of them."""


class PromptFailed(RunError):
    """One prompt was in `rollout.max_attempts` actors that died or hung; the message names it and their ends."""


class LearnerDied(RunError):
    """A process of the learner is gone; `Learner.restart` may help. The message says which and what Ray knows."""


class TransferBroke(LearnerDied):
    """A direct transfer into the engines' memory broke off: they are no more to be trusted than the learner's end of it."""


class GroupsLost(RunError):
    """Groups of a batch are gone with the node they lay on. Nothing was trained."""

    def __init__(self, message: str, positions: Sequence[int]) -> None:
        """`positions`: of the lost groups' prompts in the stream."""
        super().__init__(message)
        self.positions = tuple(positions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes."""
        return type(self), (str(self), self.positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedGroup:
    """A finished group: an opaque reference to the object and what the driver may know of it."""

    prompt: Prompt
    ref: Any
    """A reference that the learner can resolve (Ray: an ObjectRef of a TrajectoryGroup)."""
    summary: GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """One engine, as the sending end of a publication sees it."""

    home: str
    """The same for two engines exactly when they see the same files in memory (`NodeWeightFile.identity`)."""
    handle: Any
    """The transport's own (Ray: the rollout actor's handle)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """One policy version on its way to the engines."""

    version: int
    payload: Any
    """The transport's own: for the object store, manifest and chunk references; None where the engines have them already."""
    probe: Callable[[], Awaitable[Probe]]
    """What proves them; the same whenever it is asked. Asked for first when the engines have loaded: on a shared machine they
    need the cores until then."""
    homes: frozenset[str] | None = None
    """Where an engine that joins later finds them: the homes of such engines; None: anywhere. Under NCCL nowhere."""

    def reaches(self, home: str) -> bool:
        """Whether an engine of that home, which was not there at the publication, can still receive them."""
        return self.homes is None or home in self.homes


MakeWeights = Callable[[Sequence[Receiver]], Awaitable[PublishedWeights]]
"""Publishes the current policy towards the given engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStatus:
    """One rollout actor, for `ray-rl status`."""

    name: str
    state: str
    """starting, waiting for weights, serving, draining."""
    groups: int
    """In flight."""
    served: int
    """Groups since it started."""


class RolloutPool(Protocol):
    """Rollout actors as one. Dead ones are replaced; a replacement has the current weights, proven, before it gets work."""

    @property
    def size(self) -> int:
        """Actors that are wanted (`resize`), those that are still starting included."""

    @property
    def waits_for_weights(self) -> bool:
        """Whether an actor that joined can only get weights by another publication."""

    @property
    def died(self) -> int:
        """Actors lost since the start of the pool."""

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """Sample, score and value one prompt on the least loaded actor, when there is a place.

        Raises:
            PromptFailed: it cost `rollout.max_attempts` actors.
            NoActorsLeft: none has been there for `rollout.outage_timeout`.
        """

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored completions without values; temperature 0 is greedy. Waits and raises as `collect` does."""

    async def publish(self, make: MakeWeights) -> dict[str, float]:
        """Bring a version into every engine and prove it. Returns metrics. Engines that cannot take it are replaced.

        Raises:
            WeightTransferError: no engine took it, and at least one failed its proof.
            NoActorsLeft: as `collect`.
        """

    def resize(self, size: int) -> None:
        """Want so many actors from now on: more are started, surplus ones end when their groups are done."""

    def status(self) -> Sequence[ActorStatus]:
        """Every actor there is."""


class Learner(Protocol):
    """The ranks of the learner as one. Every verb but `restart` raises LearnerDied when a rank's process is gone."""

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """One training step on the groups of a batch.

        Raises:
            GroupsLost: some cannot be fetched any more; nothing was trained.
        """

    async def publish(self, version: int, receivers: Sequence[Receiver]) -> PublishedWeights:
        """The current policy as a new version."""

    async def save(self, folder: Place) -> Mapping[str, FileEntry]:
        """Everything a resumed run needs of the learner; what was put into a store, nothing where the folder is a path."""

    async def load(self, folder: Place) -> None:
        """The inverse of `save`, for a learner that has not trained since it (re)started."""

    async def export(self, folder: Place) -> Mapping[str, FileEntry]:
        """The policy in Hugging Face format. Returns as `save` does."""

    async def restart(self) -> None:
        """End what is left of the ranks and start new ones, with the initial policy."""


class Recorder(Protocol):
    """Keeps samples of what was trained on."""

    async def record(self, step: int, groups: Sequence[CollectedGroup]) -> None:
        """Keep some of a step's groups. Ones that cannot be fetched any more are left out."""

    def rewind(self, step: int) -> None:
        """What was kept of later steps is taken back: they are done once more."""
