"""Where a sitting of a run begins: in a new folder, or in that of a run that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_rl.config import RunConfig, load_config, resolve_config
from ray_rl.doctor import require
from ray_rl.errors import ConfigError
from ray_rl.object_store import Place
from ray_rl.run_places import create_run, is_run, open_run
from ray_rl.run_report import is_complete
from ray_rl.run_state import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Sitting:
    """What `ray-rl train` is about to do. Whoever makes one raises ConfigError for what the user got wrong."""

    config: RunConfig
    folder: RunFolder
    is_new: bool
    """Whether the folder was made for it."""
    is_repeated: bool
    """Whether the same command may have been given before, as when a job is submitted again."""
    warnings: Sequence[str]
    """For the user, one line each."""

    @classmethod
    def new(cls, recipe: str, overrides: Sequence[str], run_dir: Place | None) -> Sitting:
        """A run that has not begun; without `run_dir`, in a folder of its own below runs/."""
        config = load_config(recipe, overrides)
        warnings = require(config, folder=run_dir or Path("runs"))
        folder = create_run(run_dir, config)
        return cls(config=config, folder=folder, is_new=True, is_repeated=False, warnings=warnings)

    @classmethod
    def resumed(cls, run: Place, overrides: Sequence[str]) -> Sitting:
        """A run that is there, by the configuration it was last started with."""
        folder = open_run(run)
        config = resolve_config(folder.config_data(), overrides)
        warnings = require(config, folder=run)
        return cls(config=config, folder=folder, is_new=False, is_repeated=False, warnings=warnings)

    @classmethod
    def repeated(cls, recipe: str, overrides: Sequence[str], run_dir: Place) -> Sitting:
        """The run in a folder by the recipe as it is given now, begun where none is there."""
        config = load_config(recipe, overrides)
        warnings = require(config, folder=run_dir)
        is_new = not is_run(run_dir)
        folder = create_run(run_dir, config) if is_new else open_run(run_dir)
        return cls(config=config, folder=folder, is_new=is_new, is_repeated=True, warnings=warnings)

    @property
    def has_nothing_to_do(self) -> bool:
        """Whether it repeats what is done already. Whoever says `--resume` wants something of the run."""
        return self.is_repeated and is_complete(self.folder.path, self.config.training.steps)


def choose(
    recipe: str | None, overrides: Sequence[str], *, run_dir: Place | None, resume: Place | None, continued: bool
) -> Sitting:
    """The sitting that the options of `ray-rl train` ask for.

    Args:
        recipe: with `resume`, the first of the overrides.
        overrides: section.key=value.
        run_dir: the folder of the run.
        resume: the folder of a run to go on with.
        continued: whether there may be a run in `run_dir`, to go on with.

    Raises:
        ConfigError: the options contradict each other, or one of them is wrong.
    """
    if continued and (resume or not run_dir):
        raise ConfigError("--continue: needs --run-dir DIR and goes without --resume")
    if resume:
        if run_dir:
            raise ConfigError("--run-dir: a resumed run stays in its folder; leave it out")
        return Sitting.resumed(resume, [*([recipe] if recipe else []), *overrides])
    if not recipe:
        raise ConfigError("train: name a recipe (ray-rl recipes lists them), or --resume RUN")
    if continued and run_dir:
        return Sitting.repeated(recipe, overrides, run_dir)
    return Sitting.new(recipe, overrides, run_dir)
