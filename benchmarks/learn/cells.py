"""One training run of the comparison, its own unit: what is done stays done when the suite is stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.learn.methods import METHODS
from ray_rl.config import load_config

RECIPE = Path(__file__).parent / "chains.yaml"
CELL_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a policy had cost and could do after some updates; one update is one training step."""

    step: int
    accuracy: float
    """On held-out problems, sampled."""
    tokens: float
    """Sampled for training so far, continuations included."""
    seconds: float
    """Spent on training steps so far; evaluation is no part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A method at one learning rate and seed."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.replace(' ', '-').replace('=', '')}-lr{self.lr:g}-seed{self.seed}"


def curve_of(cell: Cell, folder: Path, shared: Sequence[str]) -> list[Point]:
    """Train a cell, unless its result lies in the folder already.

    Args:
        cell: what to train.
        folder: of all cells' results.
        shared: overrides that hold for all cells; a result made under another configuration is made again.
    """
    file = folder / f"{cell.name}.json"
    overrides = [*METHODS[cell.method], *shared, f"learner.optimizer.lr={cell.lr}", f"seed={cell.seed}"]
    # Problems come in another order with another seed, so that a seed is a whole repetition.
    config = load_config(str(RECIPE), overrides).model_dump(mode="json")
    if file.is_file():
        found = json.loads(file.read_text())
        if found["config"] == config:
            return [Point(**point) for point in found["curve"]]
    run = folder / "runs" / cell.name
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "ray_rl", "train", str(RECIPE), *overrides, "--run-dir", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=CELL_SECONDS)
    curve = read_curve((run / "metrics.jsonl").read_text().splitlines())
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps({"config": config, "curve": [asdict(point) for point in curve]}, indent=1) + "\n")
    whole.rename(file)
    shutil.rmtree(run)
    return curve


def read_curve(lines: Sequence[str]) -> list[Point]:
    """From a run's metrics: a point for each evaluation."""
    curve, tokens, seconds, step = [], 0.0, 0.0, 0
    for line in map(json.loads, lines):
        if "timing/step" in line:
            step += 1
            tokens += line["tokens/primary"] + line["tokens/continuations"]
            seconds += line["timing/step"]
        if "eval/pass@1" in line:
            curve.append(Point(step=step, accuracy=line["eval/pass@1"], tokens=tokens, seconds=seconds))
    return curve
