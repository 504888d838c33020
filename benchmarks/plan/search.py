"""Which split of a cluster between rollouts and learner makes a recipe's step shortest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.plan.rates import Rates
from benchmarks.plan.room import Room
from benchmarks.plan.simulation import Forecast, Split, forecast
from ray_rl.config import RunConfig
from ray_rl.errors import ConfigError, RunError

_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)
"""Of the most ranks there can be: where the search looks first."""
_ALL = 12
"""Up to so many possibilities, each is tried."""
_FINENESS = 32
"""The best number of ranks is found to a 32nd of the most there can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was tried for a cluster."""

    room: Room
    config: RunConfig
    forecasts: Sequence[Forecast]
    """The shortest step first."""
    failures: Mapping[int, str]
    """Ranks -> why a run with so many would not go on."""

    @property
    def best(self) -> Forecast:
        """Of those that were tried."""
        return self.forecasts[0]

    def cost(self, found: Forecast) -> float | None:
        """Of a step, for the whole cluster; None where it has no price."""
        price = self.room.price_per_hour
        return None if price is None else price * found.step_seconds / 3600


def search(
    config: RunConfig,
    rates: Rates,
    room: Room,
    *,
    steps: int = 4,
    most_groups: int = 256,
    tried: Callable[[Forecast], object] = lambda found: None,
) -> Plan:
    """Try numbers of ranks, the rest of the cluster being rollout actors: coarsely first, then around the best.

    Args:
        config: the recipe; its own numbers of actors and ranks don't matter.
        rates: of its parts.
        room: the cluster.
        steps: as for `forecast`.
        most_groups: as for `forecast`.
        tried: told of each as it comes.

    Raises:
        ConfigError: there is no room, or the rates were measured with another tensor parallelism.
        RunError: with no split the run would go on.
    """
    most = min(room.most_ranks, config.minibatch_size)
    if most < 1:
        raise ConfigError(
            f"--cluster: has no room for one rollout actor ({room.actor}) and one learner rank ({room.rank}) at once"
        )
    if config.rollout.tensor_parallel != rates.engine.tensor_parallel:
        raise ConfigError(
            f"rates: engine.tensor_parallel: {rates.engine.tensor_parallel}, but rollout.tensor_parallel is "
            f"{config.rollout.tensor_parallel}; give rates of such an engine"
        )
    found: dict[int, Forecast] = {}
    failures: dict[int, str] = {}

    def seconds(ranks: int) -> float:
        if ranks not in found and ranks not in failures:
            split = Split(actors=room.most_actors(ranks), ranks=ranks)
            try:
                found[ranks] = forecast(config, rates, split, steps=steps, most_groups=most_groups)
                tried(found[ranks])
            except RunError as error:
                failures[ranks] = str(error)
        return found[ranks].step_seconds if ranks in found else math.inf

    first = range(1, most + 1) if most <= _ALL else sorted({max(1, round(share * most)) for share in _SHARES})
    refine(list(first), seconds, max(1, most // _FINENESS))
    if not found:
        raise RunError(f"with no split the run would go on; with {min(failures)} ranks: {failures[min(failures)]}")
    in_order = sorted(found.values(), key=lambda one: (float(f"{one.step_seconds:.4g}"), one.split.ranks))
    return Plan(room=room, config=config, forecasts=in_order, failures=failures)


def refine(tried: list[int], value: Callable[[int], float], distance: int) -> int:
    """The number with the smallest value: the best of `tried`, then halving the gaps around it down to a distance.

    Right where values fall up to the best and rise after it.
    """
    while True:
        tried.sort()
        best = min(tried, key=value)
        place = tried.index(best)
        gaps = [(tried[at], tried[at + 1]) for at in (place - 1, place) if 0 <= at < len(tried) - 1]
        new = [(low + high) // 2 for low, high in gaps if high - low > distance]
        if not new:
            return best
        tried.extend(new)


def scaled_batch(config: RunConfig, factor: float) -> RunConfig:
    """The recipe with a batch that has grown with the cluster, and as many optimizer steps as before.

    Raises:
        ConfigError: there is no such batch.
    """
    prompts = config.training.prompts_per_step * factor
    minibatch = config.learner.minibatch_size and config.learner.minibatch_size * factor
    if prompts < 1 or prompts % 1 or (minibatch or 0) % 1:
        raise ConfigError(
            f"--scale-batch: training.prompts_per_step or learner.minibatch_size times {factor:g} is no whole number; "
            "choose others"
        )
    changed = {
        "training": config.training.model_copy(update={"prompts_per_step": int(prompts)}),
        "learner": config.learner.model_copy(update={"minibatch_size": minibatch and int(minibatch)}),
    }
    return config.model_copy(update=changed)
