"""What a run tells of itself: metrics, samples of groups, the screen, the report at its end. It decides nothing."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

from ray_rl.config import RunConfig
from ray_rl.health import Health
from ray_rl.progress import ProgressView
from ray_rl.protocols import CollectedGroup, Recorder
from ray_rl.run_report import RunReport
from ray_rl.sinks import MetricSink
from ray_rl.startup import Startup

T = TypeVar("T")


class Journal:
    """All places where something of a run is written, as one."""

    def __init__(
        self,
        config: RunConfig,
        *,
        sink: MetricSink,
        recorder: Recorder,
        progress: ProgressView,
        report: RunReport,
        startup: Startup | None = None,
    ) -> None:
        """Of one sitting.

        Args:
            config: of the run.
            sink: where metrics go.
            recorder: keeps samples of a step's groups.
            progress: what the user sees.
            report: filled while the run goes on.
            startup: told of the first group; what it has then goes into the metrics of the first step. Unset: one of its own.
        """
        self._sink = sink
        self._recorder = recorder
        self._progress = progress
        self._health = Health(config)
        self._logged: frozenset[str] = frozenset()
        self._last_step_at = time.monotonic()
        self.report = report
        self.startup = startup or Startup()
        """How long the process took to get so far."""
        self.phase = "starting"
        """What the run is doing."""
        self.last: Mapping[str, float] = {}
        """Metrics of the last training step."""

    @property
    def seconds_since_step(self) -> float:
        """Since the last training step ended, or since the start."""
        return time.monotonic() - self._last_step_at

    def begin(self, phase: str) -> None:
        """Something long begins."""
        self.phase = phase
        self._progress.phase(phase)

    def warn(self, text: str) -> None:
        """Something is not as it should be."""
        self._progress.warn(text)

    def note(self, text: str) -> None:
        """Something that the user may want to know."""
        self._progress.note(text)

    async def timed(self, phase: str, work: Awaitable[T]) -> T:
        """Await, and add the seconds to the report's phase."""
        started = time.monotonic()
        try:
            return await work
        finally:
            self.report.spend(phase, time.monotonic() - started)

    def learned(self, step: int, metrics: Mapping[str, float]) -> None:
        """The learner has done a step, which is not published yet: what is known of it by now."""
        self._sink.log(step, metrics)
        self._logged = frozenset(metrics)

    async def step(self, step: int, metrics: dict[str, float], groups: Sequence[CollectedGroup]) -> None:
        """A step is done and published.

        Args:
            step: its number.
            metrics: all of them; what follows from them is added.
            groups: trained on.
        """
        tokens = metrics["tokens/primary"] + metrics["tokens/continuations"]
        metrics["perf/tokens_per_second"] = tokens / metrics["timing/step"]
        warnings = self._health.check(step, metrics)
        metrics |= self._health.metrics()
        if not self.last:  # the first step of this sitting
            metrics |= self.startup.metrics
        await self._recorder.record(step, groups)
        self._sink.log(step, {name: value for name, value in metrics.items() if name not in self._logged})
        self._progress.step(step, metrics)
        for warning in warnings:
            self._progress.warn(warning)
        self.report.steps = step
        self.report.spend("rollout", metrics["timing/rollout"])
        self.report.spend("train", metrics["timing/train"])
        self.report.primary_tokens += int(metrics["tokens/primary"])
        self.report.continuation_tokens += int(metrics["tokens/continuations"])
        self.last, self._last_step_at = metrics, time.monotonic()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The policy after a step was evaluated."""
        self.report.evaluation_after = metrics
        self._progress.evaluation(step, metrics)
        self._sink.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Later steps are undone: what was written of them is taken back."""
        self._sink.rewind(step)
        self._recorder.rewind(step)
        self.report.steps = step
