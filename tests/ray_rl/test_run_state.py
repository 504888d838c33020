"""The run folder: whole checkpoints or none, and one user at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_rl.config import ConfigError, RunConfig, resolve_config
from ray_rl.run_state import RunFolder, RunState


def state(step: int) -> RunState:
    return RunState(step=step, policy_version=step, position=4 * step, pending_positions=(1, 5), seed=3)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", RunConfig(seed=3))


def save(folder: RunFolder, step: int) -> None:
    with folder.new_checkpoint(state(step)) as path:
        (path / "policy").mkdir()


def test_the_resolved_configuration_reads_back(tmp_path):
    config = resolve_config({"advantage": {"kind": "grpo"}, "values": {"kind": "none"}}, ["learner.optimizer.lr=3e-4"])
    folder = RunFolder.create(tmp_path / "run", config)
    assert resolve_config(RunFolder.open(tmp_path / "run").config_data()) == config
    assert folder.path.is_absolute()


def test_without_a_path_runs_get_folders_of_their_own_even_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.create(None, RunConfig(name="try")) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert all(folder.path.parent == tmp_path / "runs" and folder.path.name.startswith("try-") for folder in folders)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder.is_run(RunFolder.create(tmp_path / "run", RunConfig()).path)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty; name a new folder"):
        RunFolder.create(tmp_path, RunConfig())


def test_a_folder_with_a_run_in_it_is_refused_with_the_way_to_go_on(folder):
    with pytest.raises(ConfigError, match=r"is not empty; go on with it: train --resume "):
        RunFolder.create(folder.path, RunConfig())


def test_what_is_no_run_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"not a run folder"):
        RunFolder.open(tmp_path)


def test_a_run_without_checkpoints_resumes_from_nothing_with_its_seed(folder):
    assert folder.latest_state() == RunState.new(3)


def test_a_checkpoint_holds_the_state(folder):
    save(folder, 2)
    save(folder, 10)
    assert folder.steps() == [2, 10]
    assert folder.latest_state() == state(10)
    assert folder.state(2) == state(2)
    assert folder.policy() == folder.checkpoint(10) / "policy"
    assert folder.policy(2) == folder.checkpoint(2) / "policy"


def test_a_checkpoint_that_failed_amid_is_none(folder):
    save(folder, 1)

    def fail_amid() -> None:
        with folder.new_checkpoint(state(2)) as path:
            (path / "policy").mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_amid()
    assert folder.latest_state() == state(1)
    with pytest.raises(ConfigError, match=r"no complete checkpoint of step 2; there are: 1"):
        folder.state(2)


def test_a_process_killed_while_saving_leaves_no_checkpoint(folder):
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom ray_rl.run_state import RunFolder, RunState\n"
        f"folder = RunFolder.open(Path({str(folder.path)!r}))\n"
        "with folder.new_checkpoint(RunState.new(0)) as path:\n"
        "    (path / 'policy').mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert folder.steps() == []
    folder.prune(1)
    assert list((folder.path / "checkpoints").iterdir()) == []


def test_a_step_can_be_saved_again(folder):
    save(folder, 1)
    with folder.new_checkpoint(state(1)) as path:
        (path / "new").touch()
    assert (folder.checkpoint(1) / "new").exists()
    assert not (folder.checkpoint(1) / "policy").exists()


def test_pruning_keeps_the_newest(folder):
    for step in (9, 10, 11):
        save(folder, step)
    folder.prune(2)
    assert folder.steps() == [10, 11]


def test_no_checkpoint_no_policy(folder):
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        folder.policy()


def test_a_folder_in_use_is_refused_and_the_user_named(folder):
    with (
        folder.locked(),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is using this run"),
        RunFolder.open(folder.path).locked(),
    ):
        pass


def test_the_lock_goes_with_its_process(folder):
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom ray_rl.run_state import RunFolder\n"
        f"with RunFolder.open(Path({str(folder.path)!r})).locked():\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    with folder.locked():
        pass


def test_a_changed_configuration_replaces_the_old_one(folder):
    folder.write_config(RunConfig(seed=3, name="longer"))
    assert folder.config_data()["name"] == "longer"


def test_a_folder_whose_run_never_began_can_be_removed_and_one_with_metrics_stays(folder):
    (folder.path / "metrics.jsonl").write_text("{}\n")
    folder.remove_unused()
    assert folder.path.is_dir()
    (folder.path / "metrics.jsonl").unlink()
    folder.remove_unused()
    assert not folder.path.exists()
