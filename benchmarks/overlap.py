"""What a step takes over the longer of its two halves, sampling and training, with engines and a learner that only sleep.

The orchestrator, its buffer and the pool are the real ones. Nothing computes, so that what is left is their scheduling.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.pool import ActorPool
from benchmarks.suite import Case, CaseResult, Options, median
from ray_rl.config import RunConfig, resolve_config
from ray_rl.orchestrator import Orchestrator
from ray_rl.prompt_stream import PromptStream
from ray_rl.protocols import CollectedGroup, PublishedWeights
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.types import NO_COST, GroupSummary, Problem, Prompt, ScoredSample, StepStats
from ray_rl.weight_manifest import Probe

_ENGINES = 2
_GROUPS_IN_FLIGHT = 8
_GROUP_SECONDS = 0.4
_SPREAD = 0.4
"""Standard deviation of the logarithm of a group's seconds: the longest of a batch take 2 to 3 times the median."""
_BATCH = 32
_SYNC_SECONDS = 0.005
_TRAIN_OVER_ROLLOUT = (0.5, 1.0, 2.0)
_STALENESS = (0, 1, 2)


def run(options: Options) -> CaseResult:
    """Sampling by itself first; then, for each length of training, the whole with 0, 1 and 2 versions of staleness."""
    steps = 6 if options.quick else 4 * options.repeats
    rollout = median([step["timing/step"] for step in _steps(steps, train_seconds=0.0, max_staleness=0)])
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    details: dict[str, Any] = {"rollout seconds": rollout}
    for share in _TRAIN_OVER_ROLLOUT:
        train = share * rollout
        for staleness in _STALENESS:
            measured = _steps(steps, train_seconds=train, max_staleness=staleness)
            medians = {name: median([step[name] for step in measured]) for name in measured[0]}
            over_max = medians["timing/step"] / max(rollout, train)
            over_busy = medians["timing/step"] / max(_busy_seconds(), train)
            name = f"train {share:g} x rollout, max_staleness {staleness}"
            rows.append(
                {
                    "case": name,
                    "rollout s": rollout,
                    "train s": train,
                    "step s": medians["timing/step"],
                    "over max": over_max,
                    "over busy": over_busy,
                    "learner waits s": medians["timing/rollout"],
                    "engines idle s": medians["timing/engines_idle"],
                }
            )
            details[name] = measured
            if staleness:
                headline[name] = over_max
    return CaseResult(headline={"step_over_max": headline}, rows=rows, details=details)


def _busy_seconds() -> float:
    """Mean work of a batch over all places: what sampling would take if no batch ever had to wait for its last group."""
    return _BATCH * _GROUP_SECONDS * math.exp(_SPREAD**2 / 2) / (_ENGINES * _GROUPS_IN_FLIGHT)


def _steps(steps: int, *, train_seconds: float, max_staleness: int) -> Sequence[Mapping[str, float]]:
    """Metrics of each step but the first two, in which the pipeline fills."""
    total = steps + 2
    config = resolve_config(
        {
            "training": {"steps": total, "prompts_per_step": _BATCH, "max_staleness": max_staleness},
            "evaluation": {"at_start": False, "at_end": False},
            "checkpoint": {"every": 0},
        }
    )
    sink = _Sink()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_train(config, RunFolder.create(Path(folder), config), sink, train_seconds))
    return sink.steps[2:]


async def _train(config: RunConfig, folder: RunFolder, sink: _Sink, train_seconds: float) -> None:
    pool = ActorPool(
        _SleepingEngine,
        _ENGINES,
        groups_in_flight=_GROUPS_IN_FLIGHT,
        start_timeout=60,
        group_timeout=60,
        publish_timeout=60,
    )
    await Orchestrator(
        config,
        pool=pool,
        learner=_SleepingLearner(train_seconds),
        stream=PromptStream([Problem(problem_id="p", prompt="p", answer="")], _prompt, seed=0, shuffle=False),
        evaluation_prompts=[],
        folder=folder,
        sink=sink,
        record=_keep_nothing,
        progress=_Silence(),
        report=RunReport(name="overlap", folder=str(folder.path)),
    ).run(RunState.new(config.seed))


class _SleepingEngine:
    """A rollout actor that takes its time."""

    def __init__(self, index: int) -> None:
        self.name = f"sleeping engine {index}"
        self._version = 0

    async def start(self) -> None: ...

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        version = self._version
        # The same for a prompt's position in each run.
        await asyncio.sleep(_GROUP_SECONDS * random.Random(prompt.position).lognormvariate(0.0, _SPREAD))
        return CollectedGroup(prompt=prompt, ref=None, summary=_summary(prompt, version))

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        return ()

    async def receive_weights(self, weights: PublishedWeights) -> float:
        await asyncio.sleep(_SYNC_SECONDS)
        self._version = weights.version
        return _SYNC_SECONDS

    async def prove_weights(self, probe: Probe) -> float:
        return 0.0

    async def take_underfull(self) -> float:
        return 0.0

    async def discard_weights(self, version: int) -> None: ...

    async def shutdown(self) -> None: ...


class _SleepingLearner:
    """A learner that takes its time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        await asyncio.sleep(self._seconds)
        return StepStats(metrics={})

    async def publish(self, version: int) -> PublishedWeights:
        return PublishedWeights(version=version, payload=None, probe=_probe)

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    async def load(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


async def _probe() -> Probe:
    return Probe(token_ids=(), logprobs=())


class _Sink:
    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        kept = (
            "timing/step",
            "timing/rollout",
            "timing/train",
            "timing/engines_idle",
            "staleness/max",
            "groups/dropped",
        )
        self.steps.append({name: metrics[name] for name in kept})

    def close(self) -> None: ...


class _Silence:
    def phase(self, text: str) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def warn(self, text: str) -> None: ...


async def _keep_nothing(step: int, groups: Sequence[CollectedGroup]) -> None: ...


def _prompt(problem: Problem, *, position: int) -> Prompt:
    return Prompt(problem=problem, position=position, token_ids=(0,))


def _summary(prompt: Prompt, version: int) -> GroupSummary:
    return GroupSummary(
        prompt_id=prompt.prompt_id,
        position=prompt.position,
        oldest_version=version,
        newest_version=version,
        rewards=(0.0, 1.0),
        lengths=(1, 1),
        truncated=0,
        failures=0,
        graded=2,
        segments=2,
        value_mean=0.5,
        value_stderr=0.0,
        cost=NO_COST,
    )


OVERLAP = Case(
    name="overlap",
    about="a step over the longer of sampling and training, with engines and a learner that sleep",
    run=run,
)
