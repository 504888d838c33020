"""Time of each phase of a training step of the laptop recipes, and VinePPO's price over GRPO's, adaptive and fixed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite import Case, CaseResult, Options, median

_PHASES = ("timing/rollout", "timing/train", "timing/weight_sync", "timing/step")
_TOKENS = ("tokens/primary", "tokens/continuations")
_VARIANTS: Mapping[str, tuple[str, Sequence[str]]] = {
    "laptop-grpo": ("laptop-grpo", ()),
    "laptop-vineppo": ("laptop-vineppo", ()),
    "continuations trained": ("laptop-vineppo", ("values.train_on_continuations=true",)),
    "fixed K=3": ("laptop-vineppo", ("values={kind: fixed, num_continuations: 3}",)),
    "fixed K=9": ("laptop-vineppo", ("values={kind: fixed, num_continuations: 9}",)),
}
"""Name -> recipe and overrides; the prompts, the group size and the start are the same for all."""


def run(options: Options) -> CaseResult:
    """Train each variant for a few steps in a process of its own and take medians over its steps but the first."""
    steps = 1 + (2 if options.quick else options.repeats)
    measured = {name: _steps(recipe, overrides, steps) for name, (recipe, overrides) in _VARIANTS.items()}
    medians = {
        name: {phase: median([step[phase] for step in of_variant]) for phase in (*_PHASES, *_TOKENS)}
        for name, of_variant in measured.items()
    }
    rows = [
        {
            "variant": name,
            **{f"{phase.removeprefix('timing/').removeprefix('weight_')} s": of_variant[phase] for phase in _PHASES},
            "tokens": round(of_variant["tokens/primary"]),
            "continued": round(of_variant["tokens/continuations"]),
        }
        for name, of_variant in medians.items()
    ]
    over_grpo = {
        name: of_variant["timing/step"] / medians["laptop-grpo"]["timing/step"] for name, of_variant in medians.items()
    }
    headline = {
        "vineppo_over_grpo": over_grpo["laptop-vineppo"],
        "trained_over_grpo": over_grpo["continuations trained"],
        "fixed_3_over_grpo": over_grpo["fixed K=3"],
        "fixed_9_over_grpo": over_grpo["fixed K=9"],
    }
    return CaseResult(headline=headline, rows=rows, details=measured)


def _steps(recipe: str, variant: Sequence[str], steps: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        overrides = [*variant, f"training.steps={steps}", "evaluation.at_start=false", "evaluation.at_end=false"]
        command = [sys.executable, "-m", "ray_rl", "train", recipe, *overrides, "--run-dir", str(run_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1800)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "timing/step" in line]
    return [{name: line[name] for name in (*_PHASES, *_TOKENS)} for line in trained[1:]]


STEP = Case(name="step", about="time of each phase of a step: GRPO, VinePPO, VinePPO with fixed K", run=run)
