"""A run during which a random component is killed about every 15 seconds, over a calm one of as many steps."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.suite import Case, CaseResult, Options, median
from benchmarks.training_process import PARTS, Part, RunFailed, SeenStep, TrainingProcess
from ray_rl.ledger import LedgerAudit, audit
from ray_rl.run_state import RunFolder

ACTORS = 2
_RECIPE = "laptop-grpo"
_PROBLEMS = 512
OVERRIDES = (
    f"rollout.num_actors={ACTORS}",
    "rollout.kv_cache_gib=0.25",
    "rollout.max_attempts=10",
    f"reward={{kind: python, function: '{Path(__file__).parent / 'chaos_reward.py'}:score'}}",
    "learner.max_restarts=1000",
    # A third of the recipe's, so that chance in the last steps of an endless run does not decide its accuracy.
    "learner.optimizer.lr=1e-4",
    "training.steps=100000",
    "training.prompts_per_step=8",
    "training.max_staleness=1",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "checkpoint.every=2",
    "logging.tensorboard=false",
)
_BETWEEN_SECONDS = (12.0, 18.0)
_LOOK_SECONDS = 0.25
_START_SECONDS = 300.0
_RECOVERY_SECONDS = 300.0
_STOP_SECONDS = 180.0
_TAIL = 6000
"""Characters of what a run printed that are shown when it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A component that was killed, and what became of it."""

    kind: Part
    at: float
    """Seconds after the first step."""
    step: int
    """Seen last before it."""
    recovery: float
    """Seconds: for a rollout actor or its engine until as many engines as before serve, for the others until the next step
    is done; nan where the next fault that stops the run came first."""


def run(options: Options) -> CaseResult:
    """The run with faults first: the calm one is then stopped at its step."""
    work = options.work / "chaos"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    faults, steps = _chaotic(work / "chaotic", 60 * options.minutes)
    calm = _calm(work / "calm", steps[-1].step)
    ending = _ending(work / "chaotic")
    accuracy = {name: _accuracy(work / name) for name in ("chaotic", "calm")}
    recovered = [fault.recovery for fault in faults if not math.isnan(fault.recovery)]
    headline = {
        "lost": len(ending.lost),
        "duplicated": len(ending.duplicated),
        "faults": dict(Counter(fault.kind for fault in faults)),
        "recover_median_s": median(recovered),
        "recover_worst_s": max(recovered),
        "throughput_ratio": _steps_per_hour(steps) / _steps_per_hour(calm),
        "final_accuracy": accuracy,
    }
    details = {
        "faults": [asdict(fault) for fault in faults],
        "ledger": {"trained": ending.trained, "dropped": dict(ending.dropped), "pending": ending.pending},
        "steps": steps[-1].step,
        "steps_per_hour": {"chaotic": _steps_per_hour(steps), "calm": _steps_per_hour(calm)},
        "accuracy_stderr_of_difference": math.sqrt(sum(rate * (1 - rate) / _PROBLEMS for rate in accuracy.values())),
    }
    return CaseResult(headline=headline, rows=_rows(faults), details=details)


def _rows(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    rows = []
    for kind in PARTS:
        of_kind = [fault.recovery for fault in faults if fault.kind == kind]
        known = [seconds for seconds in of_kind if not math.isnan(seconds)] or [math.nan]
        rows.append({"killed": kind, "faults": len(of_kind), "median s": median(known), "worst s": max(known)})
    return rows


def _chaotic(folder: Path, seconds: float) -> tuple[Sequence[Fault], Sequence[SeenStep]]:
    training = TrainingProcess(folder)
    try:
        training.start(_RECIPE, *OVERRIDES)
        training.wait_for_step(1, _START_SECONDS)
        faults = _Tormentor(training, random.Random(0)).torment(seconds)
        training.interrupt(_STOP_SECONDS)
        return faults, training.steps
    finally:
        training.end()


def _calm(folder: Path, steps: int) -> Sequence[SeenStep]:
    training = TrainingProcess(folder)
    try:
        training.start(_RECIPE, *OVERRIDES)
        training.wait_for_step(1, _START_SECONDS)
        training.wait_for(f"step {steps}", lambda: training.last_step >= steps, _START_SECONDS + 20.0 * steps)
        training.interrupt(_STOP_SECONDS)
        return training.steps
    finally:
        training.end()


@dataclass(slots=True, kw_only=True)
class _Wound:
    """A fault from which the run has not recovered yet; times of a monotonic clock."""

    kind: Part
    at: float
    step: int
    replaced: float = math.inf
    """When a new engine was first seen, which a dead rollout actor's or engine's place is filled with."""

    def heals(self, step: SeenStep) -> bool:
        """Whether a step shows that all is well again."""
        if self.kind in ("rollout actor", "engine"):
            return step.at > self.replaced and step.metrics["pool/actors"] >= ACTORS
        return step.at > self.at


class _Tormentor:
    """Kills components of a run, one after the other, and sees how long it takes to recover."""

    def __init__(self, training: TrainingProcess, chance: random.Random) -> None:
        self._training = training
        self._chance = chance
        self._began = time.monotonic()
        self._faults: list[Fault] = []
        self._open: list[_Wound] = []
        self._bag: list[Part] = []

    def torment(self, seconds: float) -> Sequence[Fault]:
        """For so long, and then until all is well again.

        Raises:
            RunFailed: the run ended, or did not recover.
        """
        following = end = self._began
        end += seconds
        while time.monotonic() < end or self._open:
            self._look()
            if following <= time.monotonic() < end and not self._is_stopped():
                self._strike()
                following = time.monotonic() + self._chance.uniform(*_BETWEEN_SECONDS)
            time.sleep(_LOOK_SECONDS)
        return sorted(self._faults, key=lambda fault: fault.at)

    def _look(self) -> None:
        steps = self._training.look()
        process = self._training.process
        if process.poll() is not None:
            raise RunFailed(f"the run ended with {process.returncode}:\n{self._training.printed[-_TAIL:]}")
        now = time.monotonic()
        for wound in list(self._open):
            if wound.replaced == math.inf and any(_age(engine) < now - wound.at for engine in self._engines()):
                wound.replaced = now
            if healed := [step for step in steps if wound.heals(step)]:
                self._close(wound, healed[0].at - wound.at)
            elif now - wound.at > _RECOVERY_SECONDS:
                raise RunFailed(
                    f"no recovery from {wound} in {_RECOVERY_SECONDS:g} s:\n{self._training.printed[-_TAIL:]}"
                )

    def _engines(self) -> Sequence[psutil.Process]:
        return self._training.parts("engine")

    def _is_stopped(self) -> bool:
        """Whether nothing is trained for now: what is killed twice before it moves again would never move."""
        return any(wound.kind in ("learner", "driver") for wound in self._open)

    def _strike(self) -> None:
        """Kill one of a kind that is there: every kind once, in random order, then every kind again."""
        if not self._bag:
            self._bag = list(PARTS)
            self._chance.shuffle(self._bag)
        there = {kind: self._training.parts(kind) for kind in self._bag}
        kind = next((kind for kind in self._bag if there[kind]), None)
        if kind is None:
            return
        self._bag.remove(kind)
        victim = self._chance.choice(there[kind])
        if kind == "driver":
            # Its Ray goes with it, and with that whatever else was on its way back.
            for wound in list(self._open):
                self._close(wound, math.nan)
        self._open.append(_Wound(kind=kind, at=time.monotonic(), step=self._training.last_step))
        self._training.kill(victim)
        if kind == "driver":
            self._training.resume()

    def _close(self, wound: _Wound, seconds: float) -> None:
        self._open.remove(wound)
        self._faults.append(Fault(kind=wound.kind, at=wound.at - self._began, step=wound.step, recovery=seconds))


def _age(process: psutil.Process) -> float:
    """Seconds; of a process that is gone: infinity."""
    try:
        return time.time() - process.create_time()
    except psutil.NoSuchProcess:
        return math.inf


def _steps_per_hour(steps: Sequence[SeenStep]) -> float:
    """From the first step to the last; what was undone does not count."""
    return 3600 * (steps[-1].step - steps[0].step) / (steps[-1].at - steps[0].at)


def _ending(folder: Path) -> LedgerAudit:
    """Where the prompts of a run ended, by its last checkpoint."""
    run = RunFolder.open(folder)
    return audit(run.ledger, run.find_start().state)


def _accuracy(folder: Path) -> float:
    """On the held-out problems, by the run's last policy."""
    file = folder.with_name(folder.name + ".accuracy.json")
    asked = [f"evaluation.problems={_PROBLEMS}", "evaluation.greedy=false", "rollout.num_actors=1"]
    command = [sys.executable, "-m", "ray_rl", "evaluate", str(folder), *asked, "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return json.loads(file.read_text())["eval/pass@1"]


CHAOS = Case(
    name="chaos", about="a run whose components are killed every 15 s: what is lost, and what it costs", run=run
)
