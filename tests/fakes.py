"""Small stand-ins for what lies behind a protocol, and short ways to make the shared records."""

import json
from collections.abc import Callable, Mapping, Sequence

from ray_rl.inventory import FileEntry
from ray_rl.object_store import ObjectStore, Place
from ray_rl.protocols import (
    ActorStatus,
    CollectedGroup,
    GroupsLost,
    LearnerDied,
    MakeWeights,
    PublishedWeights,
    Receiver,
)
from ray_rl.types import (
    Completion,
    GroupCost,
    GroupSummary,
    Problem,
    Prompt,
    Reward,
    ScoredSample,
    StepStats,
    VersionSpan,
)
from ray_rl.weight_manifest import Probe


def problem(name: str = "p", prompt: str = "1+1:", answer: str = "2") -> Problem:
    return Problem(problem_id=name, prompt=prompt, answer=answer)


def prompt(position: int = 0, token_ids: Sequence[int] = (1, 2, 3)) -> Prompt:
    return Prompt(problem=problem(f"p{position}"), position=position, token_ids=tuple(token_ids))


def completion(token_ids: Sequence[int], *, version: int = 0, finished: bool = True, cached: int = 0) -> Completion:
    return Completion(
        token_ids=tuple(token_ids),
        behavior_logprobs=(-0.5,) * len(token_ids),
        versions=(VersionSpan(version=version, start=0, end=len(token_ids)),),
        finish_reason="stop" if finished else "length",
        cached_tokens=cached,
    )


def summary(position: int = 0, *, version: int = 0, rewards: Sequence[float] = (0.0, 1.0), **changes) -> GroupSummary:
    cost = GroupCost(
        primary_tokens=20,
        prompt_tokens=30,
        cached_prompt_tokens=15,
        continuations=12,
        continuation_tokens=60,
        states=4,
        closed_states=0,
        rounds=0,
        prefix_tokens=40,
        cacheable_prefix_tokens=20,
        cached_prefix_tokens=10,
        seconds=0.1,
    )
    values = {
        "prompt_id": f"{position}:p{position}",
        "position": position,
        "oldest_version": version,
        "newest_version": version,
        "rewards": tuple(rewards),
        "lengths": (10,) * len(rewards),
        "truncated": 0,
        "failures": 0,
        "graded": 14,
        "segments": 6,
        "value_mean": 0.5,
        "value_stderr": 0.2,
        "cost": cost,
    }
    return GroupSummary(**(values | changes))


def collected(position: int, *, version: int, rewards: Sequence[float] = (0.0, 1.0), **changes) -> CollectedGroup:
    return CollectedGroup(
        prompt=prompt(position), ref=position, summary=summary(position, version=version, rewards=rewards, **changes)
    )


class FakePool:
    """A rollout pool whose groups carry the version that was published last."""

    def __init__(self, make: Callable[[int, int], CollectedGroup] | None = None) -> None:
        self.size = 1
        self.waits_for_weights = False
        self.died = 0
        self.version = -1
        self.published: list[int] = []
        self.sampled: list[tuple[int, int]] = []
        self._make = make or (lambda position, version: collected(position, version=version))

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        self.sampled.append((prompt.position, self.version))
        return self._make(prompt.position, self.version)

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        answer = ScoredSample(reward=Reward(value=float(self.version > 0)), answer="2", tokens=5, finished=True)
        return (answer,) * samples

    async def publish(self, make: MakeWeights) -> dict[str, float]:
        weights = await make([Receiver(home="here", handle=None)])
        self.version = weights.version
        self.published.append(weights.version)
        self.waits_for_weights = False
        return {"timing/pause": 0.0, "weights/probe_max_abs_diff": 0.0}

    def resize(self, size: int) -> None:
        self.size = size

    def status(self) -> Sequence[ActorStatus]:
        return [ActorStatus(name="actor 0", state="serving", groups=0, served=len(self.sampled))]


class FakeLearner:
    """A learner that remembers what it was given, and dies or loses groups on demand.

    Its weights are the list of batches that it has trained on since the initial policy.
    """

    def __init__(self) -> None:
        self.trained: list[list[int]] = []
        """All batches ever trained on, those that were undone included."""
        self.weights: list[list[int]] = []
        self.dies_in: list[str] = []
        """Verbs that kill it, each once: `train 3` in step 3, `publish 2`, `save`, `load`, `restart`."""
        self.lost: set[int] = set()
        """Positions whose groups are gone, each once."""
        self.alive = True

    def _live(self, *verbs: str) -> None:
        for verb in verbs:
            if verb in self.dies_in:
                self.dies_in.remove(verb)
                self.alive = False
        if not self.alive:
            raise LearnerDied("rank 0 is gone")

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        self._live(f"train {step}")
        if not groups:
            raise ValueError("the learner got an empty batch")
        positions = [group.prompt.position for group in groups]
        if gone := self.lost.intersection(positions):
            self.lost -= gone
            raise GroupsLost(f"{len(gone)} groups are gone", sorted(gone))
        self.trained.append(positions)
        self.weights.append(positions)
        return StepStats(metrics={"loss/policy": 0.0, "policy/grad_norm": 1.0})

    async def publish(self, version: int, receivers: Sequence[Receiver]) -> PublishedWeights:
        self._live(f"publish {version}")
        return PublishedWeights(version=version, payload=None, probe=_no_probe)

    async def save(self, folder: Place) -> Mapping[str, FileEntry]:
        self._live("save")
        return self._put(folder, "weights.json")

    async def load(self, folder: Place) -> None:
        self._live("load")
        if isinstance(folder, ObjectStore):
            self.weights = json.loads(folder.read("weights.json"))
        else:
            self.weights = json.loads((folder / "weights.json").read_text())

    async def export(self, folder: Place) -> Mapping[str, FileEntry]:
        self._live("export")
        return self._put(folder, "policy.json")

    def _put(self, folder: Place, name: str) -> dict[str, FileEntry]:
        text = json.dumps(self.weights)
        if isinstance(folder, ObjectStore):
            folder.write(name, text.encode())
            return {name: folder.entry(name)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return {}

    async def restart(self) -> None:
        self.alive, self.weights = True, []
        self._live("restart")


async def _no_probe() -> Probe:
    raise AssertionError("the fake pool proves nothing")
