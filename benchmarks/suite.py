"""What every case of the suite shares: its result, the machine it ran on, the table and the JSON file."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from ray_rl.job_log import report_lines

STANDARD_OUTPUT = Path("-")
_WIDEST = 1000
"""Characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may ask of any case."""

    repeats: int
    """Paired repetitions; medians are reported."""
    quick: bool
    """A reduced form, for a first look."""
    minutes: float
    """How long a case goes on that has no end of its own."""
    work: Path
    """Folder for pictures, and for what a case that was stopped goes on from."""
    model: Path | None = None
    """Of gpu-check: the policy, in Hugging Face format; None: the built-in one."""
    on_cpu: bool = False
    """Of gpu-check: what can be proven without GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What a case measured."""

    headline: Mapping[str, Any]
    """The numbers that later versions are compared by: JSON key -> value, or a mapping of such keys for each subject."""
    rows: Sequence[Mapping[str, Any]]
    """A table for people; all rows have the same keys."""
    details: Mapping[str, Any]
    """Every single measurement, for whoever doubts a median."""
    failed: Sequence[str] = ()
    """What did not hold, of a case that proves something."""


def _nothing(options: Options) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One benchmark."""

    name: str
    about: str
    """One line for the list of cases."""
    run: Callable[[Options], CaseResult]
    needs: Mapping[str, str] = field(default_factory=dict)
    """What it needs besides ray-rl: module -> what pip installs."""
    lacks: Callable[[Options], str] = _nothing
    """What else keeps it from running here, in a line with its mend; empty: nothing."""

    def obstacle(self, options: Options) -> str:
        """What keeps it from running here, with its mend; empty: nothing."""
        missing = [package for module, package in self.needs.items() if importlib.util.find_spec(module) is None]
        if missing:
            return f"{self.name} needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        return self.lacks(options)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def metrics_of_steps(run: Path) -> list[dict[str, float]]:
    """What a run's folder holds of each training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "timing/step" in line]


def pyplot_without_screen() -> Any:
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def show(console: Console, case: Case, result: CaseResult) -> None:
    """Print a case's table and headline."""
    table = Table(title=f"{case.name}: {case.about}", title_justify="left")
    for column in result.rows[0]:
        table.add_column(column, justify="left" if isinstance(result.rows[0][column], str) else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # As wide as it is: a terminal breaks the lines, a file keeps them; nothing is cut.
    console.width = max(console.width, Console(width=_WIDEST).measure(table).maximum)
    console.print(table)
    for key, value in result.headline.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        for name, number in inner.items():
            console.print(f"{' '.join(filter(None, (key, name)))} = {_number(number)}", highlight=False)


def to_json(path: Path, results: Mapping[str, CaseResult]) -> None:
    """Write the headline, rows and details of every case, with the machine; to `-`, as lines that `ray-rl submit` finds."""
    cases = {
        name: {**result.headline, "rows": list(result.rows), "details": result.details}
        for name, result in results.items()
    }
    text = json.dumps(_without_nan({"machine": machine(), "cases": cases}), indent=2, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        print(report_lines(text), end="", flush=True)
    else:
        path.write_text(text)


def _without_nan(value: Any) -> Any:
    """What was not reached has no number: null, for JSON knows no nan."""
    match value:
        case Mapping():
            return {key: _without_nan(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_without_nan(inner) for inner in value]
        case float() if math.isnan(value):
            return None
    return value


def _cell(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def _number(value: float | Sequence[float]) -> str:
    match value:
        case float():
            return f"{value:.3f}"
        case int():
            return str(value)
    return "[" + ", ".join(f"{number:.3f}" for number in value) + "]"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
