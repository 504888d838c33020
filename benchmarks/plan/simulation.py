"""One way to split a cluster, simulated: the real orchestrator and pool over pretended engines and a pretended learner."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.pool import ActorPool, PoolLimits
from benchmarks.plan.parts import Draws, PlannedActor, PlannedLearner
from benchmarks.plan.rates import Rates
from benchmarks.plan.virtual_time import run_in_virtual_time
from benchmarks.simulated import SimulatedStep, lead
from ray_rl.config import RunConfig

_MOST_SECONDS_A_STEP = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Who gets how much of a cluster."""

    actors: int
    """Rollout actors."""
    ranks: int
    """Of the learner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a split would do, averaged over the steps that count. Shares are of the step time."""

    split: Split
    step_seconds: float
    tokens_per_step: float
    """Sampled: completions and continuations, what is dropped later included."""
    rollout_idle: float
    """Of the engines' time, that in which nothing ran: no work, or new weights came."""
    rollout_efficiency: float
    """Tokens, over what the engines would sample in the same time with full batches."""
    learner_idle: float
    """In which the learner did not train: waited for groups, or published."""
    sync_share: float
    """In which new weights were published."""
    driver_share: float
    """Of a core, for the one process that leads the run."""
    dropped: float
    """Groups that were too old, or decided, per step."""
    staleness: float
    """Policy versions between sampling and training, on average."""
    parts: float
    """One of so many equal parts of the cluster's engines was simulated; the learner trained for all of them."""

    @property
    def tokens_per_second(self) -> float:
        """Sampled."""
        return self.tokens_per_step / self.step_seconds


def forecast(
    config: RunConfig,
    rates: Rates,
    split: Split,
    *,
    steps: int = 4,
    most_groups: int = 1024,
    in_real_time: bool = False,
) -> Forecast:
    """Simulate a recipe with other numbers of actors and ranks than its own.

    Evaluations and checkpoints are left out. Larger batches than `most_groups` are simulated as one part of the cluster with its
    share of the batch; what that misses is that the longest of all completions is longer than the longest of a part.

    Args:
        config: the recipe.
        rates: of its parts.
        split: to be tried.
        steps: that count; those in which the pipeline fills, and empties, come besides.
        most_groups: of a step that are simulated one by one.
        in_real_time: on the ordinary event loop, so that all that is simulated is really waited for.

    Raises:
        RunError: the run would end with it, for instance because groups take longer than rollout.group_timeout.
    """
    staleness, batch = config.training.max_staleness, config.training.prompts_per_step
    part = max(1, min(split.actors, split.actors * most_groups // batch))
    groups = max(1, round(batch * part / split.actors))
    warm = staleness + 1
    cluster = _Cluster(
        _planned(config, split, groups, steps=warm + steps + staleness), rates, part, parts=batch / groups
    )
    measured = cluster.simulate(in_real_time)
    return cluster.average(split, measured, warm, warm + steps)


class _Cluster:
    """Pretended actors and a pretended learner, for one run."""

    def __init__(self, config: RunConfig, rates: Rates, actors: int, *, parts: float) -> None:
        """A part with `actors` of the planned run's actors, which has `parts` of them."""
        self._config = config
        self._rates = rates
        self._draws = Draws(config, rates)
        self._sync_seconds = rates.sync.total(config.rollout.least_actors)
        # No more groups are ever in flight: further actors would have nothing to do.
        self._employed = min(actors, (config.training.max_staleness + 1) * config.training.prompts_per_step)
        self._actors: list[PlannedActor] = []
        self._simulated = actors
        self.parts = parts
        self._busy_after: list[float] = []
        """Seconds in which engines sampled, summed over them, by the end of each step."""

    def simulate(self, in_real_time: bool) -> Sequence[SimulatedStep]:
        """All steps."""
        pool = ActorPool(self._make, self._employed, limits=_limits(self._config), warn=lambda text: None)
        learner = PlannedLearner(self._config, self._rates, self.parts)
        most_seconds = _MOST_SECONDS_A_STEP * self._config.training.steps
        with tempfile.TemporaryDirectory() as folder:
            run = lead(self._config, pool, learner, Path(folder) / "run", on_step=self._mark)
            return asyncio.run(run) if in_real_time else run_in_virtual_time(run, most_seconds=most_seconds)

    def average(self, split: Split, measured: Sequence[SimulatedStep], begin: int, end: int) -> Forecast:
        """Of the steps after number `begin`, to number `end`."""
        first, last, steps = measured[begin - 1], measured[end - 1], end - begin
        seconds = last.ended - first.ended
        means = _means([step.metrics for step in measured[begin:end]])
        tokens = (means["tokens/primary"] + means["tokens/continuations"]) * self.parts
        busy = (self._busy_after[end - 1] - self._busy_after[begin - 1]) / self._simulated
        groups = self._config.training.prompts_per_step * self.parts
        dropped = last.metrics["groups/dropped"] - first.metrics["groups/dropped"]
        best_rate = self._actors[0].engine.best_rate
        return Forecast(
            split=split,
            step_seconds=seconds / steps,
            tokens_per_step=tokens,
            rollout_idle=1 - busy / seconds,
            rollout_efficiency=tokens * steps / (best_rate * split.actors * seconds),
            learner_idle=1 - means["timing/train"] * steps / seconds,
            sync_share=means["timing/weight_sync"] * steps / seconds,
            driver_share=self._rates.driver_seconds_per_group * groups * steps / seconds,
            dropped=dropped * self.parts / steps,
            staleness=means.get("staleness/mean", 0.0),  # where every group was decided and dropped nothing has one
            parts=self.parts,
        )

    def _make(self, index: int) -> PlannedActor:
        actor = PlannedActor(index, self._config, self._rates, self._draws, self._sync_seconds)
        self._actors.append(actor)
        return actor

    def _mark(self, step: int) -> None:
        for actor in self._actors:
            actor.engine.look()
        self._busy_after.append(sum(actor.engine.busy_seconds for actor in self._actors))


def _planned(config: RunConfig, split: Split, prompts: int, *, steps: int) -> RunConfig:
    """The recipe for a run of so many steps and nothing else."""
    sections = {
        "rollout": {"num_actors": split.actors},
        "learner": {"ranks": split.ranks},
        "training": {"prompts_per_step": prompts, "steps": steps},
        "evaluation": {"at_start": False, "at_end": False, "every": 0},
        "checkpoint": {"every": 0},
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _limits(config: RunConfig) -> PoolLimits:
    rollout = config.rollout
    return PoolLimits(
        groups_in_flight=rollout.most_groups,
        start_timeout=rollout.start_timeout,
        group_timeout=rollout.group_timeout,
        publish_timeout=config.weights.timeout,
        outage_timeout=rollout.outage_timeout,
        max_attempts=1,
    )


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of metrics that every step has."""
    names = set.intersection(*(set(step) for step in steps))
    return {name: statistics.fmean(step[name] for step in steps) for name in names}
