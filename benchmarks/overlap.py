"""What a step takes over the longer of its two halves, sampling and training, with engines and a learner that only sleep."""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulated import Simulation, simulate
from benchmarks.suite import Case, CaseResult, Options, median

_ENGINES = 2
_GROUPS_IN_FLIGHT = 8
_GROUP_SECONDS = 0.4
_SPREAD = 0.4
"""Standard deviation of the logarithm of a group's seconds: the longest of a batch take 2 to 3 times the median."""
_BATCH = 32
_TRAIN_OVER_ROLLOUT = (0.5, 1.0, 2.0)
_STALENESS = (0, 1, 2)
_KEPT = (
    "timing/step",
    "timing/rollout",
    "timing/train",
    "timing/engines_idle",
    "staleness/max",
    "groups/dropped",
)


def run(options: Options) -> CaseResult:
    """Sampling by itself first; then, for each length of training, the whole with 0, 1 and 2 versions of staleness."""
    steps = 6 if options.quick else 4 * options.repeats
    rollout = median([step["timing/step"] for step in _steps(steps, train_seconds=0.0, max_staleness=0)])
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    details: dict[str, Any] = {"rollout seconds": rollout}
    for share in _TRAIN_OVER_ROLLOUT:
        train = share * rollout
        for staleness in _STALENESS:
            measured = _steps(steps, train_seconds=train, max_staleness=staleness)
            medians = {name: median([step[name] for step in measured]) for name in measured[0]}
            over_max = medians["timing/step"] / max(rollout, train)
            over_busy = medians["timing/step"] / max(_busy_seconds(), train)
            name = f"train {share:g} x rollout, max_staleness {staleness}"
            rows.append(
                {
                    "case": name,
                    "rollout s": rollout,
                    "train s": train,
                    "step s": medians["timing/step"],
                    "over max": over_max,
                    "over busy": over_busy,
                    "learner waits s": medians["timing/rollout"],
                    "engines idle s": medians["timing/engines_idle"],
                }
            )
            details[name] = measured
            if staleness:
                headline[name] = over_max
    return CaseResult(headline={"step_over_max": headline}, rows=rows, details=details)


def _busy_seconds() -> float:
    """Mean work of a batch over all places: what sampling would take if no batch ever had to wait for its last group."""
    return _BATCH * _GROUP_SECONDS * math.exp(_SPREAD**2 / 2) / (_ENGINES * _GROUPS_IN_FLIGHT)


def _steps(steps: int, *, train_seconds: float, max_staleness: int) -> Sequence[Mapping[str, float]]:
    """Metrics of each step but the first two, in which the pipeline fills."""
    simulation = Simulation(
        steps=steps + 2,
        actors=_ENGINES,
        groups_in_flight=_GROUPS_IN_FLIGHT,
        batch=_BATCH,
        max_staleness=max_staleness,
        group_seconds=_group_seconds,
        train_seconds=train_seconds,
    )
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(simulate(simulation, Path(folder) / "run"))
    return [{name: step.metrics[name] for name in _KEPT} for step in measured[2:]]


def _group_seconds(position: int) -> float:
    """The same for a prompt's position in each run."""
    return _GROUP_SECONDS * random.Random(position).lognormvariate(0.0, _SPREAD)


OVERLAP = Case(
    name="overlap",
    about="a step over the longer of sampling and training, with engines and a learner that sleep",
    run=run,
)
