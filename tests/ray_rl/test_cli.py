import json
import subprocess
import sys

import pytest
import yaml

from ray_rl.config import RunConfig, resolve_config
from ray_rl.config.load import recipe_names
from ray_rl.run_state import RunFolder, RunState


def ray_rl(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ray_rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "nowhere"), "error: recipe: nowhere is neither a file nor a shipped recipe"),
        (("train",), "error: train: name a recipe"),
        (("train", "--resume", "/nowhere"), "error: /nowhere: not a run folder"),
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
