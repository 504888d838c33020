"""Engines and a learner that only sleep, under the real orchestrator and the real pool: what is left is their scheduling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.pool import ActorPool, PoolLimits
from ray_rl.config import RunConfig, resolve_config
from ray_rl.inventory import FileEntry
from ray_rl.journal import Journal
from ray_rl.ledger import Ledger
from ray_rl.object_store import Place
from ray_rl.orchestrator import Orchestrator
from ray_rl.prompt_stream import PromptStream
from ray_rl.protocols import CollectedGroup, Learner, PublishedWeights, Receiver
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from ray_rl.types import NO_COST, GroupSummary, Problem, Prompt, ScoredSample, StepStats
from ray_rl.weight_manifest import Probe

_HOME = "here"
_SYNC_SECONDS = 0.005
_DEADLINE = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A run without any work in it."""

    steps: int
    actors: int
    groups_in_flight: int
    """Of each actor."""
    batch: int
    """Groups of a training step."""
    max_staleness: int
    group_seconds: Callable[[int], float]
    """Position of a prompt -> how long its group takes."""
    train_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """A training step as it was measured."""

    ended: float
    """Seconds of a monotonic clock."""
    cpu_seconds: float
    """Of this process, from its start to the end of the step."""
    metrics: Mapping[str, float]


async def simulate(simulation: Simulation, folder: Path) -> Sequence[SimulatedStep]:
    """Train from the first step to the last.

    Args:
        simulation: what is pretended.
        folder: where the run's files go; empty.
    """
    limits = PoolLimits(
        groups_in_flight=simulation.groups_in_flight,
        start_timeout=_DEADLINE,
        group_timeout=_DEADLINE,
        publish_timeout=_DEADLINE,
        outage_timeout=_DEADLINE,
        max_attempts=1,
    )
    pool = ActorPool(lambda index: SimulatedActor(index, simulation.group_seconds), simulation.actors, limits=limits)
    return await lead(_config(simulation), pool, SimulatedLearner(simulation.train_seconds), folder)


async def lead(
    config: RunConfig,
    pool: ActorPool,
    learner: Learner,
    folder: Path,
    *,
    on_step: Callable[[int], object] = lambda step: None,
) -> Sequence[SimulatedStep]:
    """The real orchestrator, from the first step of a new run to its last, over a pool that is not started yet.

    Args:
        config: of the run; it evaluates nothing.
        pool: of pretended actors.
        learner: pretended.
        folder: where the run's files go; empty.
        on_step: told the number of every step that is over.
    """
    sink, start, run_folder = _Sink(on_step), RunState.new(0), RunFolder.create(folder, config)
    report = RunReport(name="simulated", folder=str(folder))
    orchestrator = Orchestrator(
        config,
        pool=pool,
        learner=learner,
        stream=PromptStream([Problem(problem_id="p", prompt="p", answer="")], _prompt, seed=0, shuffle=False),
        evaluation_prompts=[],
        folder=run_folder,
        ledger=Ledger(run_folder.ledger, start),
        journal=Journal(config, sink=sink, recorder=_NoRecorder(), progress=_Silence(), report=report),
    )
    try:
        await pool.start()
        await orchestrator.run(start)
    finally:
        await pool.shutdown()
    return sink.steps


def _config(simulation: Simulation) -> RunConfig:
    return resolve_config(
        {
            "training": {
                "steps": simulation.steps,
                "prompts_per_step": simulation.batch,
                "max_staleness": simulation.max_staleness,
            },
            "rollout": {"num_actors": simulation.actors, "groups_in_flight": simulation.groups_in_flight},
            "evaluation": {"at_start": False, "at_end": False},
            "checkpoint": {"every": 0},
        }
    )


class SimulatedActor:
    """A rollout actor that takes its time (`actors.pool.RolloutClient`)."""

    def __init__(self, index: int, group_seconds: Callable[[int], float]) -> None:
        """Actor `index`."""
        self.name = f"simulated actor {index}"
        self._group_seconds = group_seconds
        self._version = 0

    @property
    def home(self) -> str:
        """All are on the same machine."""
        return _HOME

    @property
    def receiver(self) -> Receiver:
        """Of publications."""
        return Receiver(home=_HOME, handle=self)

    async def start(self) -> None:
        """Nothing is loaded."""

    async def collect(self, prompt: Prompt) -> CollectedGroup:
        """A group of the version at its start."""
        version = self._version
        await asyncio.sleep(self._group_seconds(prompt.position))
        return CollectedGroup(prompt=prompt, ref=None, summary=_summary(prompt, version))

    async def evaluate(self, prompt: Prompt, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """No answers."""
        return ()

    async def receive_weights(self, weights: PublishedWeights) -> float:
        """Take the version."""
        await asyncio.sleep(_SYNC_SECONDS)
        self._version = weights.version
        return _SYNC_SECONDS

    async def prove_weights(self, probe: Probe) -> float:
        """They are right."""
        return 0.0

    async def take_underfull(self) -> float:
        """Never."""
        return 0.0

    async def stacks(self) -> str:
        """It does nothing."""
        return ""

    async def shutdown(self) -> None:
        """Nothing has to end."""


class SimulatedLearner:
    """A learner that takes its time (`ray_rl.protocols.Learner`)."""

    def __init__(self, seconds: float) -> None:
        """Of each training step."""
        self._seconds = seconds

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """Wait."""
        await asyncio.sleep(self._seconds)
        return StepStats(metrics={})

    async def publish(self, version: int, receivers: Sequence[Receiver]) -> PublishedWeights:
        """A version without weights."""
        return PublishedWeights(version=version, payload=None, probe=_probe)

    async def save(self, folder: Place) -> Mapping[str, FileEntry]:
        """An empty folder."""
        assert isinstance(folder, Path)
        folder.mkdir(parents=True, exist_ok=True)
        return {}

    async def load(self, folder: Place) -> None:
        """Nothing."""

    async def export(self, folder: Place) -> Mapping[str, FileEntry]:
        """An empty folder."""
        assert isinstance(folder, Path)
        folder.mkdir(parents=True, exist_ok=True)
        return {}

    async def restart(self) -> None:
        """It does not die."""


async def _probe() -> Probe:
    return Probe(token_ids=(), logprobs=())


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


class _Sink:
    """Keeps the steps in memory."""

    def __init__(self, on_step: Callable[[int], object]) -> None:
        self._on_step = on_step
        self.steps: list[SimulatedStep] = []
        self._last: dict[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # A step is logged in parts; its duration belongs to the last one.
        self._last |= metrics
        if "timing/step" in metrics:
            now = time.monotonic()
            self.steps.append(SimulatedStep(ended=now, cpu_seconds=time.process_time(), metrics=self._last))
            self._last = {}
            self._on_step(step)

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class _NoRecorder:
    async def record(self, step: int, groups: Sequence[CollectedGroup]) -> None: ...

    def rewind(self, step: int) -> None: ...


class _Silence:
    """A screen that shows nothing."""

    def phase(self, text: str) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def warn(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...
