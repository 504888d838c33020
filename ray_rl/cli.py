"""The commands. Heavy modules are imported inside them, so that `--help` and faults in a recipe answer at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ray_rl.config import RunConfig, load_config, resolve_config
from ray_rl.config.load import recipe_names, recipe_text
from ray_rl.errors import ConfigError, RunError, writing
from ray_rl.object_store import is_url
from ray_rl.redaction import redact

app = typer.Typer(
    help="Reinforcement learning of language models with verifiable rewards: GRPO and VinePPO on Ray, vLLM, DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for instance rollout.group_size=4")
]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="a shipped recipe's name or a YAML file")] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="where the run lies; default runs/NAME-TIME")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="go on with this run, at its last checkpoint")
    ] = None,
    continued: Annotated[
        bool, typer.Option("--continue", help="go on with the run in --run-dir by this recipe, or begin it")
    ] = False,
) -> None:
    """Train a policy; or go on with a run: train --resume RUN."""
    from ray_rl.run_places import place_of
    from ray_rl.sitting import choose

    place, resumed = (place_of(text) if text else None for text in (run_dir, resume))
    sitting = choose(recipe, overrides or [], run_dir=place, resume=resumed, continued=continued)
    config, folder = sitting.config, sitting.folder
    with folder.locked():
        start = folder.find_start()
        if config.seed != start.state.seed:
            raise ConfigError(
                f"seed: a resumed run keeps its seed, {start.state.seed}; leave it out, or begin a new run"
            )
        if sitting.has_nothing_to_do:
            typer.echo(
                f"{folder.where}: complete after {start.state.step} steps; more training.steps would go on with it"
            )
            return
        for warning in (*start.notes, *sitting.warnings):
            typer.echo(f"warning: {warning}", err=True)
        from ray_rl.launch import train as launch_train

        try:
            report = launch_train(config, folder, start.state)
        except (RunError, KeyboardInterrupt):
            if sitting.is_new:  # who goes on with a run wants to keep it
                folder.remove_unused()
            raise
    if report.interrupted:
        raise typer.Exit(130)


@app.command()
def submit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE [KEY=VALUE]... | -- COMMAND...", help="what `train` takes; or: -- bench CASE"),
    ] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the job server: http://HEAD:8265")
    ] = None,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="where the run lies: on storage that all nodes of the cluster share"),
    ] = None,
    follow: Annotated[bool, typer.Option(help="show what the job prints, and end as it does")] = True,
    submission_id: Annotated[str | None, typer.Option(help="a name for the job; default: Ray makes one")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the report of `bench` here")] = None,
) -> None:
    """Train on a cluster: a Ray job that takes this folder along, and goes on with the run when it is submitted again."""
    from ray_rl.submission import Submission
    from ray_rl.submission import submit as submit_job

    if not address:
        raise ConfigError("--address: name the cluster's job server, http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json: {json_file.parent} is not a folder; make it first")
    if json_file and not follow:
        raise ConfigError("--json: the report comes with the end of the job; leave --no-follow out")
    job = Submission.of(words or [], run_dir=run_dir, brings_report=json_file is not None, submission_id=submission_id)
    raise typer.Exit(submit_job(job, address=address, follow=follow, json_file=json_file, say=typer.echo))


@app.command()
def validate(
    recipe: Annotated[str | None, typer.Argument(help="a shipped recipe's name or a YAML file")] = None,
    overrides: Overrides = None,
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="print the JSON schema of recipes instead")
    ] = False,
    cluster: Annotated[
        Path | None, typer.Option(help="print instead how it would lie on this cluster: a shape as in deploy/shapes/")
    ] = None,
) -> None:
    """Check a recipe and print the resolved configuration; with --cluster, whether and how it fits there."""
    if json_schema:
        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if not recipe:
        raise ConfigError("validate: name a recipe, or use --json-schema")
    config = load_config(recipe, overrides or [])
    if cluster:
        _print_layouts(config, cluster)
        return
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)


def _print_layouts(config: RunConfig, file: Path) -> None:
    from ray_rl.config.cluster_shape import load_shape
    from ray_rl.layout import layouts

    for layout in layouts(config, load_shape(file)):
        table = Table(title=f"{config.name} with {layout.rollout_actors} rollout actors on {file.stem}")
        for column in ("node", "has", "on it", "stays free"):
            table.add_column(column, overflow="fold")
        for row in layout.rows:
            table.add_row(*map(escape, (row.nodes, row.has, row.holds, row.free)))
        Console().print(table)
        for line in layout.additions:
            typer.echo(line)
        if layout.left_out:
            typer.echo(f"warning: {layout.left_out} of the {layout.rollout_actors} rollout actors find no node")


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="a recipe (its model as it is) or a run's folder or URL")
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[int | None, typer.Option(help="of a run: this step's policy; default the newest")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the numbers here")] = None,
) -> None:
    """Accuracy on the held-out problems: pass@1, greedy, and with evaluation.samples > 1 pass@k and majority@k."""
    from ray_rl.placement import is_own_ray
    from ray_rl.run_places import is_run, open_run, place_of

    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json: {json_file.parent} is not a folder; make it first")
    if is_url(source) or is_run(Path(source)):
        folder = open_run(place_of(source))
        policy = folder.policy(checkpoint)
        config = resolve_config(folder.config_data(), [*(overrides or []), f"model.path={policy}"])
        if is_url(source) and not is_own_ray(config):
            mend = "export it to storage that they share, and give model.path"
            typer.echo(f"warning: the policy was fetched to this node only; for engines on others, {mend}", err=True)
    elif checkpoint is not None:
        raise ConfigError("--checkpoint: only a run has checkpoints")
    else:
        config = load_config(source, overrides or [])
    from ray_rl.launch import evaluate_policy

    metrics = evaluate_policy(config)
    table = Table(title=f"{config.model.path}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if json_file:
        with writing(json_file):
            json_file.write_text(json.dumps(metrics, indent=2) + "\n")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a run's folder or URL")],
    directory: Annotated[Path, typer.Argument(help="must not exist yet")],
    checkpoint: Annotated[int | None, typer.Option(help="this step's policy; default the newest")] = None,
) -> None:
    """Write a run's policy in Hugging Face format, for transformers and vLLM."""
    import shutil

    from ray_rl.run_places import open_run, place_of

    if directory.exists():
        raise ConfigError(f"{directory}: exists already; name a new folder")
    folder = open_run(place_of(run))
    policy = folder.policy(checkpoint)
    with writing(directory):
        shutil.copytree(policy, directory)
    typer.echo(f"the policy of {folder.where} -> {directory}")


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="the folder or URL of a run that is going on")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """What a run in progress is doing."""
    from dataclasses import asdict

    from ray_rl.control_client import ask_status
    from ray_rl.run_places import contact_folder
    from ray_rl.status_view import status_lines

    found = ask_status(contact_folder(run))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        typer.echo("\n".join(status_lines(found)))


@app.command(context_settings={"ignore_unknown_options": True})  # or -1 would be an unknown option
def scale(
    run: Annotated[str, typer.Argument(help="the folder or URL of a run that is going on")],
    actors: Annotated[int, typer.Argument(metavar="N", help="rollout actors from now on, at least 1")],
) -> None:
    """Use more or fewer rollout actors in a run in progress; surplus ones end when their groups are done."""
    from ray_rl.control_client import order_scale
    from ray_rl.run_places import contact_folder

    typer.echo(order_scale(contact_folder(run), actors))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="a shipped recipe's name or a YAML file")] = None,
    overrides: Overrides = None,
    run_dir: Annotated[str, typer.Option(metavar="DIR|URL", help="where the run will lie")] = "runs",
) -> None:
    """Check this machine, and what a recipe asks of it; exit code 1 when something cannot work."""
    from ray_rl.doctor import examine
    from ray_rl.run_places import place_of

    config = load_config(recipe, overrides or []) if recipe else None
    findings = list(examine(config, folder=place_of(run_dir)))
    table = Table()
    for name in ("check", "found", "verdict", "mend"):
        table.add_column(name, overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "fault": "red"}
    for finding in findings:
        style = styles[finding.verdict]
        table.add_row(
            escape(finding.check), escape(finding.found), f"[{style}]{finding.verdict}[/]", escape(finding.mend)
        )
    Console().print(table)
    if any(finding.verdict == "fault" for finding in findings):
        raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """The recipes that ship with the package."""
    for name in recipe_names():
        first = next((line for line in recipe_text(name).splitlines() if line.startswith("#")), "#")
        typer.echo(f"{name:20} {first.lstrip('# ')}")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run the benchmark suite: bench [CASE ...] [--json FILE]; bench --help lists the cases."""
    raise typer.Exit(_run_program("bench", "benchmarks", context.args))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Simulate a recipe on a cluster from measured rates: plan RECIPE [KEY=VALUE ...] --cluster SHAPE; plan --help says more."""
    raise typer.Exit(_run_program("plan", "benchmarks.plan", context.args))


def _run_program(command: str, module: str, arguments: Sequence[str]) -> int:
    """Run one of the programs in benchmarks/ in the foreground; its exit code."""
    root = Path(__file__).resolve().parent.parent
    if not (root / module.replace(".", "/") / "__main__.py").is_file():
        raise ConfigError(
            f"{command}: its program lies in the repository's benchmarks/, which is not in {root}; use a checkout"
        )
    # Found by the import path and not by the working folder, to which `--json FILE` is relative.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    program = [sys.executable, "-m", module, *arguments]
    return subprocess.run(program, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def main() -> None:
    """Run the command line; the user's mistakes end with one line each and exit code 2."""
    try:
        app()
    except RunError as error:
        for line in redact(str(error)).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
