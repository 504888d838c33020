"""Small stand-ins for what lies behind a protocol, and short ways to make the shared records."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ray_rl.protocols import CollectedGroup, PublishedWeights
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

    def __init__(self, capacity: int = 4, make: Callable[[int, int], CollectedGroup] | None = None) -> None:
        self.capacity = capacity
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

    async def publish(self, weights: PublishedWeights) -> dict[str, float]:
        self.version = weights.version
        self.published.append(weights.version)
        return {"timing/pause": 0.0, "weights/probe_max_abs_diff": 0.0}


class FakeLearner:
    """A learner that remembers what it was given."""

    def __init__(self) -> None:
        self.trained: list[list[int]] = []

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        if not groups:
            raise ValueError("the learner got an empty batch")
        self.trained.append([group.prompt.position for group in groups])
        return StepStats(metrics={"loss/policy": 0.0, "policy/grad_norm": 1.0})

    async def publish(self, version: int) -> PublishedWeights:
        return PublishedWeights(version=version, payload=None, probe=_no_probe)

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    async def load(self, folder: Path) -> None:
        assert folder.is_dir()

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


async def _no_probe() -> Probe:
    raise AssertionError("the fake pool proves nothing")
