"""Time of each phase of a training step of the laptop recipes, and VinePPO's price over GRPO's, adaptive and fixed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite import Case, CaseResult, Options, median, metrics_of_steps

_PHASES = ("timing/rollout", "timing/train", "timing/weight_sync", "timing/step")
_TOKENS = ("tokens/primary", "tokens/continuations")
_STEPS = 4
_VARIANTS: Mapping[str, tuple[str, Sequence[str]]] = {
    "laptop-grpo": ("laptop-grpo", ()),
    "laptop-vineppo": ("laptop-vineppo", ()),
    "continuations trained": ("laptop-vineppo", ("values.train_on_continuations=true",)),
    "fixed K=3": ("laptop-vineppo", ("values={kind: fixed, num_continuations: 3}",)),
    "fixed K=9": ("laptop-vineppo", ("values={kind: fixed, num_continuations: 9}",)),
}
"""Name -> recipe and overrides; the prompts, the group size and the start are the same for all."""


def run(options: Options) -> CaseResult:
    """Train each variant for a few steps in a process of its own, one after the other, as often as asked for.

    The first step of a process warms up and does not count. What is compared was measured in the same round, so that a
    machine whose speed drifts does not decide; a ratio is the median over the rounds.
    """
    rounds = [
        {name: _steps(recipe, overrides) for name, (recipe, overrides) in _VARIANTS.items()}
        for _ in range(2 if options.quick else options.repeats)
    ]
    measured = {name: [of_round[name] for of_round in rounds] for name in _VARIANTS}
    rows = [{"variant": name, **_row([step for steps in measured[name] for step in steps])} for name in _VARIANTS]
    over_grpo = {
        name: median([_step_seconds(of_round[name]) / _step_seconds(of_round["laptop-grpo"]) for of_round in rounds])
        for name in _VARIANTS
    }
    headline = {
        "vineppo_over_grpo": over_grpo["laptop-vineppo"],
        "trained_over_grpo": over_grpo["continuations trained"],
        "fixed_3_over_grpo": over_grpo["fixed K=3"],
        "fixed_9_over_grpo": over_grpo["fixed K=9"],
    }
    return CaseResult(headline=headline, rows=rows, details=measured)


def _row(steps: Sequence[Mapping[str, float]]) -> dict[str, float | int]:
    """Medians over the steps of all rounds."""
    medians = {name: median([step[name] for step in steps]) for name in (*_PHASES, *_TOKENS)}
    return {
        **{f"{phase.removeprefix('timing/').removeprefix('weight_')} s": medians[phase] for phase in _PHASES},
        "tokens": round(medians["tokens/primary"]),
        "continued": round(medians["tokens/continuations"]),
    }


def _step_seconds(steps: Sequence[Mapping[str, float]]) -> float:
    return median([step["timing/step"] for step in steps])


def _steps(recipe: str, variant: Sequence[str]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        overrides = [*variant, f"training.steps={_STEPS}", "evaluation.at_start=false", "evaluation.at_end=false"]
        command = [sys.executable, "-m", "ray_rl", "train", recipe, *overrides, "--run-dir", str(run_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1800)
        trained = metrics_of_steps(run_dir)
    return [{name: step[name] for name in (*_PHASES, *_TOKENS)} for step in trained[1:]]


STEP = Case(name="step", about="time of each phase of a step: GRPO, VinePPO, VinePPO with fixed K", run=run)
