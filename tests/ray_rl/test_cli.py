import json
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from ray_rl.cli import app
from ray_rl.config import RunConfig, resolve_config
from ray_rl.config.load import recipe_names
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState, Start


def ray_rl(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ray_rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "nowhere"), "error: recipe: nowhere is neither a file nor a shipped recipe"),
        (("train",), "error: train: name a recipe"),
        (("train", "--resume", "/nowhere"), "error: /nowhere: not a run folder"),
        (("train", "--resume", "file:///nowhere"), "error: file:///nowhere: not a run folder"),
        (("train", "laptop-grpo", "--run-dir", "s3://key:secret@bucket/a"), "error: s3://bucket/a: a URL is no place"),
        (("train", "laptop-grpo", "--run-dir", "dropbox://a"), "error: dropbox://a: dropbox:// needs a package"),
        (("evaluate", "file:///nowhere"), "error: file:///nowhere: not a run folder"),
        (("export", "file:///nowhere", "/tmp/x"), "error: file:///nowhere: not a run folder"),
        (("status", "file:///nowhere"), "error: file:///nowhere: not a run folder"),
        (("scale", "file:///nowhere", "2"), "error: file:///nowhere: not a run folder"),
        (("validate", "laptop-grpo", "rollout.group_siz=3"), "error: rollout.group_siz: unknown key"),
        (
            ("validate", "laptop-grpo", "rollout.group_size=1", "learner.minibatch_size=8"),
            "error: rollout.group_size: 1 gives grpo nothing",
        ),
        (
            ("validate", "laptop-vineppo", "values.num_continuations=0"),
            "error: values.num_continuations: Input should be",
        ),
        (("validate", "laptop-grpo", "model.path=./nope"), "error: model.path: ./nope does not exist"),
        (("evaluate", "laptop-grpo", "--checkpoint", "3"), "error: --checkpoint: only a run has checkpoints"),
        (("evaluate", "laptop-grpo", "--json", "/nowhere/x"), "error: --json: /nowhere is not a folder"),
        (("export", "/nowhere", "/tmp/x"), "error: /nowhere: not a run folder"),
        (("status", "/nowhere"), "error: /nowhere: not a run folder"),
        (("scale", "/nowhere", "2"), "error: /nowhere: not a run folder"),
        (("scale", "/nowhere", "-1"), "error: N: -1 rollout actors; use at least 1"),
        (("doctor", "nowhere"), "error: recipe: nowhere is neither a file nor a shipped recipe"),
        (("train", "laptop-grpo", "ray.address=127.0.0.1:1"), "error: ray.address: no Ray answers at 127.0.0.1:1"),
        (("bench", "no-such-case"), "error: no-such-case: no such case"),
    ],
)
def test_the_users_mistakes_end_with_one_line_and_exit_code_2(arguments, line):
    done = ray_rl(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1


def test_contradictions_come_all_at_once():
    done = ray_rl("validate", "laptop-vineppo", "values.kind=none", "learner.minibatch_size=7")
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "learner.minibatch_size",
        "values.kind",
    ]


def test_validate_prints_a_configuration_that_validates_to_itself(tmp_path):
    printed = ray_rl("validate", "laptop-vineppo", "training.steps=7").stdout
    assert yaml.safe_load(printed)["training"]["steps"] == 7
    (tmp_path / "again.yaml").write_text(printed)
    assert ray_rl("validate", str(tmp_path / "again.yaml")).stdout == printed


def test_the_json_schema_names_every_section():
    schema = json.loads(ray_rl("validate", "--json-schema").stdout)
    assert {"model", "task", "rollout", "values", "learner"} <= schema["properties"].keys()


def test_recipes_are_listed_with_what_they_do():
    listed = ray_rl("recipes").stdout.splitlines()
    assert [line.split()[0] for line in listed] == recipe_names()
    assert all(len(line.split()) > 5 for line in listed)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ray_rl.cli import app\n"
        "from typer.testing import CliRunner\nassert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_resumed_run_keeps_its_seed(tmp_path):
    RunFolder.create(tmp_path / "run", RunConfig(seed=3))
    with RunFolder.open(tmp_path / "run").new_checkpoint(RunState.new(3)):
        pass
    done = ray_rl("train", "--resume", str(tmp_path / "run"), "seed=4")
    assert done.returncode == 2
    assert done.stderr == "error: seed: a resumed run keeps its seed, 3; leave it out, or begin a new run\n"


def test_resuming_a_run_that_another_process_holds_leaves_its_folder_alone(tmp_path):
    folder = RunFolder.create(tmp_path / "run", resolve_config({}))
    with folder.locked():
        done = ray_rl("train", "--resume", str(folder.path))
    assert done.returncode == 2
    assert "is using this run" in done.stderr
    assert (folder.path / "config.yaml").is_file()


def test_the_doctor_says_what_it_found_and_that_nothing_is_in_the_way():
    done = ray_rl("doctor", "laptop-vineppo")
    assert done.returncode == 0, done.stdout
    for check in ("Python", "packages", "vLLM", "memory", "ports", "model.path"):
        assert check in done.stdout


def test_the_doctors_exit_code_tells_of_a_fault():
    done = ray_rl("doctor", "laptop-vineppo", "ray.address=127.0.0.1:1")
    assert done.returncode == 1
    assert "fault" in done.stdout
    assert "refused" in done.stdout


def test_a_recipe_that_cannot_work_here_leaves_no_run_folder(tmp_path):
    done = ray_rl("train", "laptop-grpo", "ray.address=127.0.0.1:1", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_what_is_wrong_with_the_others(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run", RunConfig())
    notes = ("step 4 is damaged; going on from step 2",)
    start = Start(state=replace(RunState.new(0), step=2), notes=notes)
    monkeypatch.setattr(RunFolder, "find_start", lambda self: start)
    started = []
    launch = ModuleType("ray_rl.launch")
    launch.train = lambda config, folder, state: started.append(state.step) or RunReport(name="", folder="")
    monkeypatch.setitem(sys.modules, "ray_rl.launch", launch)
    done = CliRunner().invoke(app, ["train", "--resume", str(folder.path)])
    assert done.exit_code == 0, done.output
    assert started == [2]
    assert "warning: step 4 is damaged; going on from step 2" in done.output


@pytest.mark.parametrize("command", ["bench", "plan"])
def test_programs_of_the_repository_are_missed_without_it(command, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_rl.cli.__file__", str(tmp_path / "ray_rl" / "cli.py"))
    result = CliRunner().invoke(app, [command, "x"])
    assert str(result.exception).startswith(f"{command}: its program lies in the repository's benchmarks/")


def test_a_policy_that_finds_no_place_is_one_line(tmp_path):
    folder = RunFolder.create(tmp_path / "run", resolve_config({}))
    with folder.new_checkpoint(replace(RunState.new(0), step=1)) as new:
        (new.path / "policy").mkdir()
        (new.path / "policy" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    done = ray_rl("export", str(tmp_path / "run"), str(tmp_path / "file" / "policy"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/file/policy: could not be written: Not a directory")
    assert len(done.stderr.splitlines()) == 1
    assert ray_rl("export", str(tmp_path / "run"), str(tmp_path / "policy")).returncode == 0
    assert (tmp_path / "policy" / "config.json").read_text() == "{}"
