"""Rates from runs: what metrics.jsonl and groups.jsonl of real runs tell of the parts of a plan."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite import metrics_of_steps
from ray_rl.config import RunConfig, resolve_config
from ray_rl.config.values import NoValues
from ray_rl.errors import ConfigError
from ray_rl.recorder import read_groups
from ray_rl.run_state import RunFolder

_WARM_UP = 1
"""Steps of a run that don't count."""
_DIFFERENT = 1.5
"""Batches differ enough to tell a fixed part from one per token when the largest has so many times the smallest's tokens."""
_MOST_LENGTHS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenStep:
    """A training step of a real run."""

    config: RunConfig
    metrics: Mapping[str, float]

    @property
    def batch_tokens(self) -> float:
        """Of the completions, and of the continuations where they train; of each rank."""
        continued = self.metrics["tokens/continuations"] if self.config.trains_on_continuations else 0.0
        return self.config.learner.epochs * (self.metrics["tokens/primary"] + continued) / self.config.learner.ranks

    @property
    def updates(self) -> float:
        """Optimizer steps."""
        return self.config.learner.epochs * self.config.samples_per_step / self.config.minibatch_size

    @property
    def engine_tokens(self) -> float:
        """Of each engine."""
        return self.metrics["tokens/primary"] / self.config.rollout.least_actors

    @property
    def tells_decoding(self) -> bool:
        """Whether all sequences of the step began at once, and nothing else went on: then it had as many decoding steps as its
        longest completion has tokens."""
        places = self.config.rollout.least_actors * self.config.rollout.max_sequences
        synchronous = self.config.training.max_staleness == 0
        return synchronous and isinstance(self.config.values, NoValues) and self.config.samples_per_step <= places


def rates_of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Sections of `Rates`; only those that the runs tell of.

    The learner's fixed and proportional parts, and an engine's seconds of a decoding step for one sequence and for each further
    one, are fitted by least squares where batches differ in size. Else the learner's time counts as proportional to the tokens,
    and nothing is said of the engine.

    Args:
        folders: of runs of the same model on the same kind of machine.

    Raises:
        ConfigError: a folder is no run, or has too few steps.
    """
    steps = [step for folder in folders for step in _steps(folder)]
    metrics = [step.metrics for step in steps]
    found: dict[str, Any] = {
        "about": f"measured in {len(steps)} steps of {', '.join(str(folder) for folder in folders)}",
        "learner": _learner(steps),
        "sync": {"seconds": statistics.fmean(one["timing/weight_sync"] for one in metrics)},
        "lengths": {"measured": _lengths(folders, metrics), "prompt": 0},
        "decided_share": statistics.fmean(one["groups/decided_fraction"] for one in metrics),
    }
    if engine := _engine([step for step in steps if step.tells_decoding]):
        found["engine"] = engine
    if continued := [one for one in metrics if one["tokens/continuations"]]:
        found["continuations"] = _continuations(steps, continued)
    return found


def _steps(folder: Path) -> list[SeenStep]:
    config = resolve_config(RunFolder.open(folder).config_data())
    steps = [SeenStep(config=config, metrics=metrics) for metrics in metrics_of_steps(folder)[_WARM_UP:]]
    if not steps:
        raise ConfigError(f"--from: {folder} has no training step after its first, which only warms up; train longer")
    return steps


def _learner(steps: Sequence[SeenStep]) -> dict[str, float]:
    seconds = [step.metrics["timing/train"] for step in steps]
    tokens = [step.batch_tokens for step in steps]
    if max(tokens) >= _DIFFERENT * min(tokens):
        fixed, per_token = fitted([(step.updates, step.batch_tokens) for step in steps], seconds)
        if per_token > 0:
            return {"tokens_per_second": 1 / per_token, "fixed_seconds": fixed}
    return {"tokens_per_second": sum(tokens) / sum(seconds)}


def _engine(steps: Sequence[SeenStep]) -> dict[str, Any] | None:
    """Decoding steps of a + b n seconds with n sequences: sampling takes a times the longest completion, b times all tokens."""
    tokens = [step.engine_tokens for step in steps]
    if not tokens or max(tokens) < _DIFFERENT * min(tokens):
        return None
    causes = [(step.metrics["rollout/response_length_max"], step.engine_tokens) for step in steps]
    one, further = fitted(causes, [step.metrics["timing/rollout"] for step in steps])
    counts = (1, steps[0].config.rollout.max_sequences)
    return {
        "tokens_per_second": {count: count / (one + further * count) for count in counts},
        "tensor_parallel": steps[0].config.rollout.tensor_parallel,
    }


def _continuations(steps: Sequence[SeenStep], continued: Sequence[Mapping[str, float]]) -> dict[str, float]:
    tokens = sum(one["tokens/continuations"] for one in continued) / sum(one["tokens/primary"] for one in continued)
    count = sum(one["continuations/per_state"] * one["values/states"] for one in continued)
    completions = sum(step.config.samples_per_step for step in steps if step.metrics["tokens/continuations"])
    return {"per_completion": count / completions, "tokens_ratio": tokens}


def _lengths(folders: Sequence[Path], metrics: Sequence[Mapping[str, float]]) -> list[int]:
    """Recorded completions are few, and chosen by their rewards: their spread, with the mean of all completions."""
    recorded = [
        len(trajectory["token_ids"])
        for folder in folders
        if (folder / "groups.jsonl").is_file()
        for group in read_groups(folder / "groups.jsonl")
        for trajectory in group["trajectories"]
    ][-_MOST_LENGTHS:]
    mean = statistics.fmean(one["rollout/response_length_mean"] for one in metrics)
    factor = mean / statistics.fmean(recorded) if recorded else 0.0
    return [max(1, round(factor * length)) for length in recorded] or [max(1, round(mean))]


def fitted(causes: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares of ``seconds = a x + b y`` with a, b >= 0. ``fitted([(1, 0), (1, 2)], [3.0, 7.0]) == (3.0, 2.0)``

    Args:
        causes: (x, y) of each observation.
        seconds: what was observed.
    """
    xx = sum(x * x for x, _ in causes)
    yy = sum(y * y for _, y in causes)
    xy = sum(x * y for x, y in causes)
    xs = sum(x * second for (x, _), second in zip(causes, seconds, strict=True))
    ys = sum(y * second for (_, y), second in zip(causes, seconds, strict=True))
    divisor = xx * yy - xy * xy
    a, b = ((xs * yy - ys * xy) / divisor, (ys * xx - xs * xy) / divisor) if divisor > 0 else (0.0, ys / yy)
    if a < 0:
        return 0.0, ys / yy
    return (xs / xx, 0.0) if b < 0 else (a, b)
