"""A plan for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.plan.room import described
from benchmarks.plan.search import Plan
from benchmarks.plan.simulation import Forecast

_WIDEST = 1000
"""Characters."""
_BUSY_DRIVER = 0.7
"""Share of a core from which on the driver is said to be what limits."""


def show(console: Console, plan: Plan, most_rows: int) -> None:
    """Print the best splits of a cluster."""
    config, room = plan.config, plan.room
    table = Table(
        title=f"{room.gpus} GPUs: {described(room.shape)}; {config.training.prompts_per_step} prompts x "
        f"{config.rollout.group_size} a step, max_staleness {config.training.max_staleness}",
        title_justify="left",
    )
    rows = [_cells(plan, found) for found in plan.forecasts[:most_rows]]
    for column in rows[0]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values(), style="bold" if row is rows[0] else "")
    # As wide as it is: a terminal breaks the lines, a file keeps them.
    console.width = max(console.width, Console(width=_WIDEST).measure(table).maximum)
    console.print(table)
    for remark in remarks(plan):
        console.print(f"  {remark}", highlight=False)


def remarks(plan: Plan) -> list[str]:
    """What a reader of the best split should know."""
    best, said = plan.best, []
    in_flight = (plan.config.training.max_staleness + 1) * plan.config.training.prompts_per_step
    if best.split.actors > in_flight:
        said.append(
            f"{best.split.actors - in_flight} of {best.split.actors} actors never get a group, of which {in_flight} are in "
            "flight at most: raise training.prompts_per_step (--scale-batch), or use fewer GPUs"
        )
    if best.driver_share > _BUSY_DRIVER:
        said.append(
            f"the driver would need {best.driver_share:.0%} of a core for its groups, which is not simulated: the step would be "
            "longer"
        )
    if best.dropped:
        said.append(f"{best.dropped:.1f} groups a step are dropped, too old or decided")
    if unpriced := plan.room.without_price:
        said.append(f"the cost leaves out {', '.join(unpriced)}: give price_per_hour of all nodes")
    for ranks, why in sorted(plan.failures.items()):
        said.append(f"with {ranks} learner ranks the run would end: {why}")
    if best.parts > 1:
        said.append(
            f"simulated: one of {best.parts:.3g} equal parts of the rollout actors, with its share of the batch"
        )
    return said


def as_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """All splits that were tried, the best first."""
    return [
        {
            "gpus": plan.room.gpus,
            "nodes": {kind.name: kind.count for kind in plan.room.shape.kinds},
            "price_per_hour": plan.room.price_per_hour,
            "prompts_per_step": plan.config.training.prompts_per_step,
            "remarks": remarks(plan),
            "splits": [{**_flat(found), "cost_per_step": plan.cost(found)} for found in plan.forecasts],
        }
        for plan in plans
    ]


def _flat(found: Forecast) -> dict[str, Any]:
    numbers = asdict(found)
    return {**numbers.pop("split"), **numbers, "tokens_per_second": found.tokens_per_second}


def _cells(plan: Plan, found: Forecast) -> Mapping[str, str]:
    config, cost = plan.config, plan.cost(found)
    gpus = (found.split.actors * config.rollout.gpus_per_actor, found.split.ranks * config.learner.gpus_per_rank)
    return {
        "": "best" if found is plan.best else "",
        "rollout actors": f"{found.split.actors}",
        "learner ranks": f"{found.split.ranks}",
        "GPUs": f"{gpus[0]:g} + {gpus[1]:g}" if any(gpus) else "none",
        "step s": f"{found.step_seconds:,.4g}",
        "tokens/step": f"{found.tokens_per_step:,.0f}",
        "tokens/s": f"{found.tokens_per_second:,.0f}",
        "rollouts idle": f"{found.rollout_idle:.0%}",
        "rollouts' best rate": f"{found.rollout_efficiency:.0%}",
        "learner idle": f"{found.learner_idle:.0%}",
        "sync": f"{found.sync_share:.1%}",
        "cost/step": "" if cost is None else f"{cost:,.3g}",
    }
