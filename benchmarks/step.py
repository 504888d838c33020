"""Time of each phase of a training step of the laptop recipes, and VinePPO's price over GRPO's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.suite import Case, CaseResult, Options, median

_PHASES = ("timing/rollout", "timing/train", "timing/weight_sync", "timing/step")
_RECIPES = ("laptop-grpo", "laptop-vineppo")


def run(options: Options) -> CaseResult:
    """Train each recipe for a few steps in a process of its own and take medians over its steps but the first."""
    steps = 1 + (2 if options.quick else options.repeats)
    measured = {recipe: _steps(recipe, steps) for recipe in _RECIPES}
    medians = {
        recipe: {phase: median([step[phase] for step in of_recipe]) for phase in (*_PHASES, *_TOKENS)}
        for recipe, of_recipe in measured.items()
    }
    rows = [
        {
            "recipe": recipe,
            **{f"{phase.removeprefix('timing/').removeprefix('weight_')} s": of_recipe[phase] for phase in _PHASES},
            "tokens": round(of_recipe["tokens/primary"]),
            "continued": round(of_recipe["tokens/continuations"]),
        }
        for recipe, of_recipe in medians.items()
    ]
    ratio = medians["laptop-vineppo"]["timing/step"] / medians["laptop-grpo"]["timing/step"]
    return CaseResult(headline={"vineppo_over_grpo": ratio}, rows=rows, details=measured)


_TOKENS = ("tokens/primary", "tokens/continuations")


def _steps(recipe: str, steps: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        overrides = [f"training.steps={steps}", "evaluation.at_start=false", "evaluation.at_end=false"]
        command = [sys.executable, "-m", "ray_rl", "train", recipe, *overrides, "--run-dir", str(run_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1800)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "timing/step" in line]
    return [{name: line[name] for name in (*_PHASES, *_TOKENS)} for line in trained[1:]]


STEP = Case(name="step", about="time of each phase of a step of laptop-grpo and laptop-vineppo", run=run)
