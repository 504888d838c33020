"""Plans against what really happens: step times of runs that were predicted from other runs, and of sleeping engines."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan.rates import Rates, resolve_rates
from benchmarks.plan.runs import rates_of_runs
from benchmarks.plan.simulation import Split, forecast
from benchmarks.suite import Case, CaseResult, Options, machine, metrics_of_steps
from ray_rl.config import RunConfig, load_config

_RECIPE = "laptop-grpo"
_COMMON = (
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "checkpoint.every=0",
    "learner.minibatch_size=null",
    "logging.groups_per_step=8",
)
_MEASURED: Mapping[str, Sequence[str]] = {
    "32 prompts": (),
    "8 prompts": ("training.prompts_per_step=8",),
}
"""The runs that rates are taken from: the same in two sizes, one actor, strictly on-policy."""
_PREDICTED: Mapping[str, Sequence[str]] = {
    "16 prompts": ("training.prompts_per_step=16",),
    "64 prompts, which have to wait for places": ("training.prompts_per_step=64",),
    "completions of at most 48 tokens": ("rollout.max_tokens=48",),
    "max_staleness 1": ("training.max_staleness=1",),
    "2 actors": ("rollout.num_actors=2",),
    "2 actors, max_staleness 1": ("rollout.num_actors=2", "training.max_staleness=1"),
}
_SLEEPERS = (8, 64)
"""Actors whose engines and learner only sleep, in real time."""
_RUN_SECONDS = 1200.0


def run(options: Options) -> CaseResult:
    """Run each once; a run that `--work` holds from a stopped sitting is taken from there."""
    steps = 3 if options.quick else 8
    folders = {
        name: _trained(options.work, name, overrides, steps) for name, overrides in {**_MEASURED, **_PREDICTED}.items()
    }
    told = rates_of_runs([folders[name] for name in _MEASURED])
    about = f"measured by ray-rl bench plan with {_RECIPE} on {machine()['cores']} cores of {machine()['processor']}"
    rates = resolve_rates({**told, "about": about})
    rows = [_row(name, rates, folder, measured=name in _MEASURED) for name, folder in folders.items()]
    rows += [_asleep(actors, steps) for actors in _SLEEPERS]
    ratios = {row["run"]: row["predicted / measured"] for row in rows if row["rates"] == "others'"}
    details = {"rates": rates.model_dump(mode="json"), "steps": {name: _steps(one) for name, one in folders.items()}}
    return CaseResult(headline={"predicted_over_measured": ratios}, rows=rows, details=details)


def _trained(work: Path, name: str, overrides: Sequence[str], steps: int) -> Path:
    folder = (work / "plan" / f"{name.replace(' ', '-').replace(',', '')}-{steps}").resolve()
    if not (folder / "final").is_dir():
        count = f"training.steps={steps + 2 * _margin(load_config(_RECIPE, overrides))}"
        command = [
            sys.executable,
            "-m",
            "ray_rl",
            "train",
            _RECIPE,
            *_COMMON,
            *overrides,
            count,
            "--run-dir",
            str(folder),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_RUN_SECONDS)
    return folder


def _margin(config: RunConfig) -> int:
    """Steps at either end that do not count: the processes warm up, the pipeline fills, and empties."""
    return 1 + config.training.max_staleness


def _steps(folder: Path) -> list[dict[str, float]]:
    """What a run's metrics tell of the time, of every step."""
    kept = ("timing/", "tokens/", "staleness/mean", "rollout/response_length")
    return [{name: value for name, value in step.items() if name.startswith(kept)} for step in metrics_of_steps(folder)]


def _row(name: str, rates: Rates, folder: Path, *, measured: bool) -> dict[str, Any]:
    overrides = {**_MEASURED, **_PREDICTED}[name]
    config = load_config(_RECIPE, [*_COMMON, *overrides])
    steps = _steps(folder)[_margin(config) : -_margin(config)]
    seconds = statistics.fmean(step["timing/step"] for step in steps)
    found = forecast(config, rates, Split(actors=config.rollout.least_actors, ranks=1), steps=16)
    return {
        "run": name,
        "rates": "its own" if measured else "others'",
        "step s, measured": seconds,
        "predicted": found.step_seconds,
        "predicted / measured": found.step_seconds / seconds,
        "learner idle, measured": 1 - sum(step["timing/train"] for step in steps) / len(steps) / seconds,
        "predicted ": found.learner_idle,
        "rollouts idle, measured": sum(step["timing/engines_idle"] for step in steps) / len(steps) / seconds,
        "predicted  ": found.rollout_idle,
    }


def _asleep(actors: int, steps: int) -> dict[str, Any]:
    """The same simulation in virtual time and in real time, in which the driver's own work takes time as well."""
    config = load_config(
        "laptop-grpo",
        [f"training.prompts_per_step={4 * actors}", "training.max_staleness=1", "learner.minibatch_size=null"],
    )
    rates = resolve_rates(
        {
            "engine": {"tokens_per_second": {1: 80, 64: 2560}},
            "learner": {"tokens_per_second": 1000.0 * actors},
            "sync": {"seconds": 0.05},
            "lengths": {"mean": 40, "cv": 0.5, "prompt": 0},
        }
    )
    split = Split(actors=actors, ranks=1)
    virtual = forecast(config, rates, split, steps=steps)
    real = forecast(config, rates, split, steps=steps, in_real_time=True)
    return {
        "run": f"{actors} actors that sleep",
        "rates": "others'",
        "step s, measured": real.step_seconds,
        "predicted": virtual.step_seconds,
        "predicted / measured": virtual.step_seconds / real.step_seconds,
        "learner idle, measured": real.learner_idle,
        "predicted ": virtual.learner_idle,
        "rollouts idle, measured": real.rollout_idle,
        "predicted  ": virtual.rollout_idle,
    }


PLAN = Case(name="plan", about="step times that ray-rl plan predicts from other runs, over those of real runs", run=run)
