"""A run's present numbers as Ray metrics, which Prometheus scrapes from every Ray node and Grafana shows (deploy/grafana/).

Ray exports them with the prefix ``ray_``: ``rl_step`` is ``ray_rl_step`` there. Ray forgets a gauge with each export, every ten
seconds, so that someone has to set them for as long as the run goes on. Ray is imported where it is needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_rl.deadlines import end
from ray_rl.errors import writing
from ray_rl.mailbox import RunStatus
from ray_rl.wording import one_line

logger = logging.getLogger(__name__)

PREFIX = "ray_"
"""What Ray puts before every name."""
DISCOVERY_FILE = "prometheus.json"
_SET_SECONDS = 2.0
_END_SECONDS = 10.0
_TAGS = ("name", "run")

Reading = Callable[[RunStatus], float]

LIVE: Mapping[str, tuple[Reading, str]] = {
    "rl_step": (lambda run: run.step, "Training steps done"),
    "rl_steps": (lambda run: run.steps, "Training steps of the whole run"),
    "rl_policy_version": (lambda run: run.policy_version, "Policy version of the learner"),
    "rl_seconds_since_step": (lambda run: run.seconds_since_step, "Seconds since the last training step ended"),
    "rl_buffer_depth": (lambda run: run.buffer_depth, "Finished groups that wait for the learner"),
    "rl_groups_in_flight": (lambda run: sum(actor.groups for actor in run.actors), "Groups that are being made"),
    "rl_actors_wanted": (lambda run: run.actors_wanted, "Rollout actors that are wanted"),
    "rl_actors_alive": (lambda run: len(run.actors), "Rollout actors that there are, starting and ending ones too"),
    "rl_actors_serving": (
        lambda run: sum(actor.state == "serving" for actor in run.actors),
        "Rollout actors that make groups",
    ),
    "rl_actors_died": (lambda run: run.actors_died, "Rollout actors lost in this sitting"),
    "rl_learner_restarts": (lambda run: run.learner_restarts, "Restarts of the learner in this sitting"),
}
"""What the run is doing at the moment: gauge -> how it is read, and what it means."""

OF_A_STEP: Mapping[str, tuple[str, str]] = {
    "rl_tokens_per_second": ("perf/tokens_per_second", "Sampled tokens per second of the step"),
    "rl_step_seconds": ("timing/step", "Seconds of the step"),
    "rl_engines_idle_seconds": ("timing/engines_idle", "Seconds of the step in which the average engine had no group"),
    "rl_reward_mean": ("reward/mean", "Mean reward"),
    "rl_reward_accuracy": ("reward/accuracy", "Share of completions with a reward of at least 1"),
    "rl_reward_failures_share": ("reward/failures", "Share of gradings that failed"),
    "rl_response_tokens_mean": ("rollout/response_length_mean", "Mean tokens of a completion"),
    "rl_truncated_share": ("rollout/truncated_rate", "Share of completions that ran out of tokens"),
    "rl_decided_groups_share": ("groups/decided_fraction", "Share of groups whose rewards are all equal"),
    "rl_staleness_mean": ("staleness/mean", "Mean policy versions between sampling and training"),
    "rl_staleness_max": ("staleness/max", "Most policy versions between sampling and training"),
    "rl_prompt_cache_hits_share": ("rollout/cache_hit_rate", "Share of prompt tokens found in the prefix cache"),
    "rl_continuation_cache_hits_share": (
        "continuations/cache_hit_rate",
        "Share of the continuations' prefix tokens found in the prefix cache",
    ),
    "rl_continuation_tokens_share": (
        "continuations/tokens_share",
        "What state values cost: share of the sampled tokens that are continuations",
    ),
    "rl_grad_norm": ("policy/grad_norm", "Norm of the gradient"),
    "rl_entropy": ("policy/entropy", "Entropy of the policy, per token"),
    "rl_evaluation_accuracy": ("eval/pass@1", "Mean reward on held-out problems, sampled"),
    "rl_evaluation_greedy": ("eval/greedy", "Mean reward on held-out problems, greedy"),
}
"""The last value that was logged: gauge -> metric of metrics.jsonl, and what it means."""

PHASE_GAUGE = "rl_phase_seconds"
"""With the tag `phase`."""
PHASES: Mapping[str, str] = {
    "rollout": "timing/rollout",
    "train": "timing/train",
    "weight_sync": "timing/weight_sync",
}
_PHASE_MEANING = "Seconds of the step that went into a phase; rollout is the wait for groups"


def descriptions() -> dict[str, str]:
    """Every gauge and what it means."""
    tables: Sequence[Mapping[str, tuple[Any, str]]] = (LIVE, OF_A_STEP)
    return {name: meaning for table in tables for name, (_, meaning) in table.items()} | {PHASE_GAUGE: _PHASE_MEANING}


class RayGauges:
    """A `MetricSink` of which Prometheus sees the last values, with the tags `name` and `run`."""

    def __init__(self, name: str, run: str, *, exports: bool = True) -> None:
        """Nothing is exported before `shown`.

        Args:
            name: of the configuration.
            run: tells this run from others of the same name: its folder's name.
            exports: False for a run that does not want it; `shown` then does nothing.
        """
        self._exports = exports
        self._tags = {"name": name, "run": run}
        self._last: dict[str, float] = {}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the values that are numbers."""
        self._last |= {name: float(value) for name, value in metrics.items() if math.isfinite(value)}

    def rewind(self, step: int) -> None:
        """Later steps are undone: nothing is known until the next one."""
        self._last.clear()

    def close(self) -> None:
        """Nothing is ever pending."""

    def readings(self, status: RunStatus) -> Iterator[tuple[str, float, Mapping[str, str]]]:
        """What the gauges have to show: name, value, further tags."""
        for name, (read, _) in LIVE.items():
            yield name, float(read(status)), {}
        for name, (metric, _) in OF_A_STEP.items():
            if metric in self._last:
                yield name, self._last[metric], {}
        for phase, metric in PHASES.items():
            if metric in self._last:
                yield PHASE_GAUGE, self._last[metric], {"phase": phase}

    @asynccontextmanager
    async def shown(self, status: Callable[[], RunStatus]) -> AsyncIterator[None]:
        """Export while this is entered. What goes wrong in it is a line in the log and never ends the run.

        Args:
            status: tells what the run is doing.
        """
        if not self._exports:
            yield
            return
        task = asyncio.create_task(self._keep_setting(status), name="gauges")
        task.add_done_callback(_ended)
        try:
            yield
        finally:
            await end(task, _END_SECONDS, what="the task that sets Ray's gauges")

    async def _keep_setting(self, status: Callable[[], RunStatus]) -> None:
        while True:
            for name, value, tags in self.readings(status()):
                self._gauge(name).set(value, {**self._tags, **tags})
            await asyncio.sleep(_SET_SECONDS)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            tags = (*_TAGS, "phase") if name == PHASE_GAUGE else _TAGS
            self._gauges[name] = Gauge(name, description=descriptions()[name], tag_keys=tags)
        return self._gauges[name]


@contextmanager
def discoverable(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """For Prometheus' file discovery: in the run's folder, where to scrape, as long as this is entered.

    A Ray cluster with a dashboard writes such a file itself; this one is for a Ray of the run's own.

    Args:
        folder: of the run.
        tell: told the address.

    Raises:
        NotWritten: the system refused.
    """
    targets, path = _targets(), folder / DISCOVERY_FILE
    with writing(path):
        path.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]) + "\n")
    try:
        for target in targets:
            tell(f"metrics for Prometheus: http://{target}/metrics")
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _targets() -> list[str]:
    import ray

    exporting = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in exporting]


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("Prometheus sees nothing of this run any more: %s", one_line(error))
