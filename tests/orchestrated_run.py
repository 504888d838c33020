"""An orchestrator on fakes, with everything it touches in reach."""

import asyncio

from ray_rl.config import RunConfig, resolve_config
from ray_rl.journal import Journal
from ray_rl.ledger import Ledger
from ray_rl.orchestrator import Orchestrator
from ray_rl.prompt_stream import PromptStream
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from tests.fakes import FakeLearner, FakePool, problem, prompt


class Sink:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step, metrics) -> None:
        if self.logged and self.logged[-1][0] == step:
            self.logged[-1][1].update(metrics)
        else:
            self.logged.append((step, dict(metrics)))

    def rewind(self, step) -> None:
        self.logged = [(logged, metrics) for logged, metrics in self.logged if logged <= step]

    def close(self) -> None: ...


class Screen:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def phase(self, text) -> None: ...

    def step(self, step, metrics) -> None: ...

    def evaluation(self, step, metrics) -> None: ...

    def warn(self, text) -> None:
        self.warnings.append(text)

    def note(self, text) -> None:
        self.notes.append(text)


class Run:
    """An orchestrator on fakes, with everything it touches in reach."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, pool: FakePool | None = None, learner: FakeLearner | None = None
    ) -> None:
        self.pool = pool or FakePool()
        self.learner = learner or FakeLearner()
        self.sink = Sink()
        self.screen = Screen()
        self.folder = folder
        self.config = config
        self.recorded: list[int] = []
        self.recorded_groups: list[list[int]] = []
        self.stop_at: int | None = None
        self.room = 1000
        """Rollout actors that the cluster has a place for."""
        problems = [problem(f"p{index}") for index in range(10)]
        self.stream = PromptStream(problems, lambda row, *, position: prompt(position), seed=config.seed, shuffle=True)
        self.report = RunReport(name="test", folder=str(folder.path))

    async def record(self, step, groups) -> None:
        self.recorded.append(step)
        self.recorded_groups.append([group.prompt.position for group in groups])
        if step == self.stop_at:
            self.orchestrator.request_stop()

    def rewind(self, step) -> None:
        kept = [index for index, recorded in enumerate(self.recorded) if recorded <= step]
        self.recorded = [self.recorded[index] for index in kept]
        self.recorded_groups = [self.recorded_groups[index] for index in kept]

    @property
    def steps(self) -> list[dict[str, float]]:
        """Metrics of the training steps, in order."""
        return [metrics for _, metrics in self.sink.logged if "timing/step" in metrics]

    def go(self, start: RunState | None = None) -> "Run":
        asyncio.run(asyncio.wait_for(self.run(start or RunState.new(0)), 10))
        return self

    async def run(self, start: RunState) -> None:
        self.ledger = Ledger(self.folder.path / "ledger.jsonl", start)
        self.orchestrator = Orchestrator(
            self.config,
            pool=self.pool,
            learner=self.learner,
            stream=self.stream,
            evaluation_prompts=[prompt(-1)],
            folder=self.folder,
            ledger=self.ledger,
            journal=Journal(self.config, sink=self.sink, recorder=self, progress=self.screen, report=self.report),
            without_place=lambda size: max(0, size - self.room),
        )
        if start.step:
            await self.learner.load(self.folder.checkpoint(start.step) / "learner")
        await self.orchestrator.run(start)


def config_of(**training) -> RunConfig:
    training = {"steps": 3, "prompts_per_step": 4} | training
    return resolve_config({"training": training, "evaluation": {"problems": 1}})
