"""From `ray-rl train` to the first finished group, on a machine that has run it before: when, and at what CPU time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.suite import Case, CaseResult, Options, median
from benchmarks.training_process import TrainingProcess

_MILESTONES: Mapping[str, str] = {
    "prepared": "model and data read",
    "ray": "Ray up",
    "reward_actors": "reward actors ready",
    "learner": "learner ready",
    "engines": "engine ready",
    "first_request": "first group asked for",
    "first_group": "first group done",
}
_OVERRIDES = (
    "training.steps=1",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    # Graded in a reward actor, so that there is one to start.
    "reward={kind: math}",
)
_SECONDS = 600.0


def run(options: Options) -> CaseResult:
    """Start laptop-grpo as a user does, as often as asked for, and read what the run itself says of its start.

    One start before those that count fills the caches of the disk, of vLLM and of torch. CPU seconds are those of all
    processes until the first group is done: on few cores they decide, and other work on the machine changes them little.
    """
    _start()
    starts = [_start() for _ in range(2 if options.quick else options.repeats)]
    rows = [{"until": said, **_seconds(starts, f"startup/{name}_seconds")} for name, said in _MILESTONES.items()]
    rows.append({"until": "CPU of all processes", **_seconds(starts, "startup/cpu_seconds")})
    headline = {
        "first_group_seconds": median([start["startup/first_group_seconds"] for start in starts]),
        "cpu_seconds": median([start["startup/cpu_seconds"] for start in starts]),
    }
    return CaseResult(headline=headline, rows=rows, details={"starts": starts})


def _seconds(starts: list[dict[str, float]], name: str) -> dict[str, float]:
    measured = [start[name] for start in starts]
    return {"median s": median(measured), "least": min(measured), "most": max(measured)}


def _start() -> dict[str, float]:
    """What a run says of its start."""
    with tempfile.TemporaryDirectory() as folder:
        process = TrainingProcess(Path(folder) / "run")
        try:
            process.start("laptop-grpo", *_OVERRIDES)
            process.wait_for_step(1, _SECONDS)
            process.wait_for_end(_SECONDS)
        finally:
            process.end()
        return {name: value for name, value in process.steps[0].metrics.items() if name.startswith("startup/")}


STARTUP = Case(name="startup", about="seconds from `ray-rl train` to the first finished group", run=run)
