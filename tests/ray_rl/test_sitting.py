"""`ray-rl train --continue`, which a job that is submitted again uses: begin a run, go on with it, or find it done."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from ray_rl.cli import app
from ray_rl.config import load_config
from ray_rl.errors import ConfigError
from ray_rl.run_report import REPORT_FILE, RunReport, is_complete
from ray_rl.run_state import RunFolder
from ray_rl.sitting import choose


@pytest.fixture
def launched(monkeypatch) -> list[tuple[int, int]]:
    """(step that a sitting began at, steps it was to reach); nothing heavy is started."""
    sittings = []

    def train(config, folder, start):
        sittings.append((start.step, config.training.steps))
        with folder.new_checkpoint(replace(start, step=min(2, config.training.steps))):
            pass
        return RunReport(name="", folder="")

    launch = ModuleType("ray_rl.launch")
    launch.train = train
    monkeypatch.setitem(sys.modules, "ray_rl.launch", launch)
    return sittings


def train(folder: Path, *overrides: str):
    arguments = ["train", "laptop-grpo", *overrides, "--run-dir", str(folder), "--continue"]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output, done.exception


def report(folder: Path, steps: int, *, interrupted: bool = False) -> None:
    (folder / REPORT_FILE).write_text(json.dumps({"steps": steps, "interrupted": interrupted}))


def test_the_same_command_begins_a_run_and_goes_on_with_it_by_the_recipe_as_it_is_given(tmp_path, launched):
    folder = tmp_path / "run"
    assert train(folder, "training.steps=3")[0] == 0
    assert train(folder, "training.steps=4")[0] == 0
    assert launched == [(0, 3), (2, 4)]


def test_a_run_that_is_complete_is_left_alone_until_more_is_asked_of_it(tmp_path, launched):
    folder = tmp_path / "run"
    train(folder, "training.steps=2")
    report(folder, 2)
    code, output, _ = train(folder, "training.steps=2")
    assert (code, launched) == (0, [(0, 2)])
    assert "complete after 2 steps" in output
    train(folder, "training.steps=3")
    assert launched == [(0, 2), (2, 3)]


def test_another_seed_is_refused(tmp_path, launched):
    folder = tmp_path / "run"
    train(folder)
    code, _, error = train(folder, "seed=4")
    assert code
    assert isinstance(error, ConfigError)
    assert "a resumed run keeps its seed, 0" in str(error)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        choose("laptop-grpo", [], run_dir=tmp_path, resume=None, continued=True)


@pytest.mark.parametrize("where", [{"run_dir": None, "resume": None}, {"run_dir": Path("x"), "resume": Path("x")}])
def test_what_is_continued_must_have_a_name(where):
    with pytest.raises(ConfigError, match=r"^--continue: needs --run-dir DIR"):
        choose("laptop-grpo", [], **where, continued=True)


def test_a_sitting_that_fails_leaves_a_run_that_was_there(tmp_path, launched):
    folder = RunFolder.create(tmp_path / "run", load_config("laptop-grpo"))

    def fail(config, folder, start):
        raise ConfigError("no")

    sys.modules["ray_rl.launch"].train = fail
    train(folder.path)
    assert RunFolder.is_run(folder.path)
    train(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ('{"steps": 5, "interrupted": false}', True),
        ('{"steps": 4, "interrupted": false}', False),
        ('{"steps": 5, "interrupted": true}', False),
        ('{"steps": 5', False),
        ("[]", False),
    ],
)
def test_a_report_tells_whether_a_run_is_complete(tmp_path, text, complete):
    assert not is_complete(tmp_path, 5)
    (tmp_path / REPORT_FILE).write_text(text)
    assert is_complete(tmp_path, 5) is complete
