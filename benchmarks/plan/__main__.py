"""`python -m benchmarks.plan RECIPE [KEY=VALUE ...] --cluster SHAPE.yaml`: what `ray-rl plan` runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from benchmarks.plan.rates import Rates, read_rates, resolve_rates
from benchmarks.plan.report import as_json, show
from benchmarks.plan.room import Room, gpus_of, with_gpus
from benchmarks.plan.runs import rates_of_runs
from benchmarks.plan.search import Plan, scaled_batch, search
from benchmarks.plan.simulation import Forecast
from ray_rl.config import RunConfig, load_config
from ray_rl.config.cluster_shape import ClusterShape, load_shape
from ray_rl.errors import ConfigError, RunError
from ray_rl.placement import Demand, shortage

_EXAMPLE = Path(__file__).parent / "example_rates.yaml"
_CHECKED_BUNDLES = 1024
"""Up to so many actors and ranks, the best split is laid out node by node, as `ray-rl validate --cluster` does."""


def plan(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    cluster: Annotated[Path | None, typer.Option(help="the cluster's shape, a YAML file; its `count` nodes")] = None,
    rates: Annotated[
        Path | None, typer.Option(help="measured rates: a YAML file, or what ray-rl bench plan --json wrote")
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--from", help="a run's folder; what it tells goes over the rates; may be repeated"),
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="one number over both, as engine.group_seconds=0.1; may be repeated")
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="with so many GPUs instead, as 8,64,512: more or fewer of the same nodes")
    ] = "",
    scale_batch: Annotated[
        bool, typer.Option("--scale-batch", help="training.prompts_per_step grows with the GPUs")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="that are simulated for each split, when it runs smoothly")] = 4,
    groups: Annotated[int, typer.Option(min=1, help="of a step that are simulated; of more, an equal part")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="splits to show for each cluster")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all that was tried here")] = None,
) -> None:
    """Step time, idle shares, tokens, cost, and the best split of a cluster between rollouts and learner: simulated.

    The run's own loops and pool lead engines and a learner that only take their time, as rates that were measured say.
    """
    if cluster is None:
        raise ConfigError("plan: name the cluster: --cluster SHAPE.yaml")
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json: {json_file.parent} is not a folder; make it first")
    config, shape, known = (
        load_config(recipe, overrides or []),
        load_shape(cluster),
        _rates(rates, runs or [], rate or []),
    )
    clusters = list(_clusters(config, shape, _numbers(gpus), scale_batch))
    console = Console()
    console.print(f"rates: {known.about or 'nobody says where they were measured'}", highlight=False)
    plans: list[Plan] = []
    for grown, room in clusters:
        with console.status("simulating") as status:
            tell = partial(_tell, status)
            plans.append(search(grown, known, room, steps=steps, most_groups=groups, tried=tell))
        show(console, plans[-1], rows)
        _warn_of_shortage(plans[-1])
        if json_file:
            data = {"rates": known.model_dump(mode="json"), "plans": as_json(plans)}
            json_file.write_text(json.dumps(data, indent=2) + "\n")


def _clusters(
    config: RunConfig, shape: ClusterShape, numbers: Sequence[int], scale_batch: bool
) -> Iterator[tuple[RunConfig, Room]]:
    """The cluster with each number of GPUs, or as it is, and the recipe for it."""
    if scale_batch and not numbers:
        raise ConfigError("--scale-batch: the batch grows with the GPUs; name numbers of them: --gpus 8,64")
    for number in numbers:
        scaled = with_gpus(shape, number)
        grown = scaled_batch(config, number / gpus_of(shape)) if scale_batch else config
        yield grown, Room.of(grown, scaled)
    if not numbers:
        yield config, Room.of(config, shape)


def _tell(status: Status, found: Forecast) -> None:
    status.update(f"simulated {found.split.actors} rollout actors, {found.split.ranks} learner ranks")


def _rates(path: Path | None, runs: Sequence[Path], overrides: Sequence[str]) -> Rates:
    if path is None and not runs and not overrides:
        raise ConfigError(
            f"plan: no rates; give --from RUN, --rates FILE (an example with every option: {_EXAMPLE}), or the numbers: "
            "--rate 'engine.tokens_per_second={1: 90, 64: 4600}' --rate learner.tokens_per_second=9000"
        )
    data: dict[str, Any] = read_rates(path) if path else {}
    return resolve_rates({**data, **rates_of_runs(runs)} if runs else data, overrides)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")] if text else []
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ConfigError(f"--gpus: {text!r:.80} is no list of numbers; write it as 8,64,512")
    return numbers


def _warn_of_shortage(found: Plan) -> None:
    split, config = found.best.split, found.config
    if split.actors + split.ranks > _CHECKED_BUNDLES:
        return
    learner = config.learner.model_copy(update={"ranks": split.ranks})
    demand = Demand.of(config.model_copy(update={"learner": learner}), rollout_actors=split.actors)
    if missing := shortage(demand, found.room.shape.nodes()):
        typer.echo(f"warning: {missing}", err=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(plan)
    try:
        app(prog_name="ray-rl plan")
    except RunError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
