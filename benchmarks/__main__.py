"""`python -m benchmarks [CASE ...] [--json FILE]`: run cases one after the other, print tables, write JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.chaos import CHAOS
from benchmarks.gpu_check import GPU_CHECK
from benchmarks.gradient import GRADIENT
from benchmarks.learn.case import LEARN
from benchmarks.learner import LEARNER
from benchmarks.overlap import OVERLAP
from benchmarks.plan.case import PLAN
from benchmarks.rollout import ROLLOUT
from benchmarks.scale import SCALE
from benchmarks.startup import STARTUP
from benchmarks.step import STEP
from benchmarks.suite import STANDARD_OUTPUT, Case, Options, machine, show, to_json
from benchmarks.values.case import VALUES
from benchmarks.versus_trl import VERSUS_TRL
from benchmarks.weights import WEIGHTS

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        ROLLOUT,
        LEARNER,
        WEIGHTS,
        OVERLAP,
        SCALE,
        PLAN,
        CHAOS,
        STARTUP,
        STEP,
        VERSUS_TRL,
        VALUES,
        GRADIENT,
        LEARN,
        GPU_CHECK,
    )
}

_EPILOG = "Cases: " + "; ".join(f"{case.name} ({case.about})" for case in CASES.values())


def run(
    cases: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="default: all")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every number here; -: print it")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="paired repetitions; medians are reported")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="a reduced form of each case")] = False,
    minutes: Annotated[float, typer.Option(min=0.5, help="chaos: for how long components are killed")] = 5.0,
    work: Annotated[Path, typer.Option(help="where pictures go, and what a stopped case goes on from")] = Path(
        "runs/bench"
    ),
    model: Annotated[Path | None, typer.Option(help="gpu-check: folder of a policy; default: the built-in one")] = None,
    on_cpu: Annotated[bool, typer.Option("--on-cpu", help="gpu-check: what can be proven without GPUs")] = False,
) -> None:
    """Run the benchmark suite."""
    console = Console()
    chosen = cases or list(CASES)
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        typer.echo(f"error: {', '.join(unknown)}: no such case; there are {', '.join(CASES)}", err=True)
        sys.exit(2)
    if json_file and json_file != STANDARD_OUTPUT and not json_file.parent.is_dir():
        typer.echo(f"error: --json: {json_file.parent} is not a folder; make it first", err=True)
        sys.exit(2)
    options = Options(repeats=repeats, quick=quick, minutes=minutes, work=work, model=model, on_cpu=on_cpu)
    for name in list(chosen):
        if obstacle := CASES[name].obstacle(options):
            if cases:
                typer.echo(f"error: {obstacle}", err=True)
                sys.exit(2)
            typer.echo(f"left out: {obstacle}", err=True)
            chosen.remove(name)
    work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in chosen:
        results[name] = CASES[name].run(options)
        show(console, CASES[name], results[name])
        if json_file:
            to_json(json_file, results)
    console.print(f"measured on: {machine()}", highlight=False)
    sys.exit(any(result.failed for result in results.values()))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=_EPILOG)(run)
    app(prog_name="ray-rl bench")
