"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ray_rl.redaction import redact
from ray_rl.run_report import RunReport


class ProgressView(Protocol):
    """Where the orchestrator reports."""

    def phase(self, text: str) -> None:
        """Something long begins."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A training step is done."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""

    def note(self, text: str) -> None:
        """Something that the user may want to know: an actor is back, the learner started anew."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""


class ConsoleProgress:
    """A live bar on a terminal; a line per event elsewhere."""

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        *,
        also: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Show steps.

        Args:
            total_steps: of the whole run.
            first_step: after which this sitting begins.
            console: where to; unset: standard output.
            also: told each line that is shown.
        """
        self._also = also
        self._phase = ""
        self._console = console or Console()
        self._total = total_steps
        self._first = first_step
        self._started: float | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total_steps, completed=first_step, numbers="")

    def __enter__(self) -> ConsoleProgress:
        """Start the live display."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._bar.update(self._task, description=text)
        if text == self._phase:
            return
        self._phase = text
        self._say(text, shown=not self._console.is_terminal)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show step, reward, accuracy, tokens per second and time left."""
        now = time.monotonic()
        duration = metrics.get("timing/step", 0.0)
        if self._started is None:
            self._started = now - duration
        left = (self._total - step) * (now - self._started) / max(step - self._first, 1)
        numbers = (
            f"reward {metrics['reward/mean']:.3f}  accuracy {metrics['reward/accuracy']:.3f}  "
            f"{metrics['perf/tokens_per_second']:,.0f} tok/s  {duration:.1f} s/step  left {_clock(left)}"
        )
        self._bar.update(self._task, description="training", completed=step, numbers=numbers)
        self._phase = "training"
        self._say(f"step {step}/{self._total}  {numbers}", shown=not self._console.is_terminal)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation's accuracies."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if _is_accuracy(name))
        self._say(f"evaluation after step {step}: {shown}")

    def note(self, text: str) -> None:
        """Show a line."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._say(text, before="[yellow]warning[/yellow]: ")

    def _say(self, text: str, *, before: str = "", shown: bool = True) -> None:
        line = before + escape(redact(text))
        if shown:
            self._console.print(line, soft_wrap=True)
        self._also(Text.from_markup(line).plain)

    def report(self, report: RunReport) -> None:
        """The table at the end."""
        self._console.print(_report_table(report))
        for line in report.next_steps:
            self._console.print(line, soft_wrap=True, highlight=False)


def _report_table(report: RunReport) -> Table:
    table = Table(title=f"{report.name}: {report.steps} steps", show_header=True, title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = report.evaluation_before, report.evaluation_after
    for name in filter(_is_accuracy, dict.fromkeys((*before, *after))):
        table.add_row(name, *(f"{side[name]:.3f}" if name in side else "" for side in (before, after)))
    table.add_section()
    table.add_row("completion tokens", "", f"{report.primary_tokens:,}")
    table.add_row("continuation tokens", "", f"{report.continuation_tokens:,}")
    for phase, seconds in report.seconds.items():
        table.add_row(f"time: {phase}", "", f"{seconds:.1f} s")
    if report.peak_bytes:
        table.add_row("peak memory, all processes", "", f"{report.peak_bytes / 2**30:.1f} GiB")
    table.add_section()
    table.add_row("run folder", "", report.folder)
    return table


def _is_accuracy(name: str) -> bool:
    return name == "eval/greedy" or name.startswith(("eval/pass@", "eval/majority@"))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
