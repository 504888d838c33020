"""The run folder: whole checkpoints or none, and one user at a time."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_rl.config import ConfigError, RunConfig, resolve_config
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import NotWritten, RunError
from ray_rl.run_state import RunFolder, RunState
from tests.little_room import with_little_room


def state(step: int) -> RunState:
    return RunState(
        step=step,
        policy_version=step,
        position=4 * step,
        pending_positions=(1, 5),
        seed=3,
        trained=3 * step,
        dropped={"stale": step},
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", RunConfig(seed=3))


def save(folder: RunFolder, step: int) -> None:
    with folder.new_checkpoint(state(step)) as new:
        for name, size in {"learner/rank_0": 9000, "learner/rank_1": 50, "policy/weights": 5000}.items():
            (new.path / name).parent.mkdir(exist_ok=True)
            (new.path / name).write_bytes(bytes(size))


@pytest.fixture
def saved(folder: RunFolder) -> RunFolder:
    for step in (4, 8):
        save(folder, step)
    return folder


def test_the_resolved_configuration_reads_back(tmp_path):
    config = resolve_config({"advantage": {"kind": "grpo"}, "values": {"kind": "none"}}, ["learner.optimizer.lr=3e-4"])
    folder = RunFolder.create(tmp_path / "run", config)
    assert resolve_config(RunFolder.open(tmp_path / "run").config_data()) == config
    assert folder.path.is_absolute()


@pytest.mark.parametrize("content", [b"", b"a: [", b"\x00\xff\x89", b"words", b"- 1\n"])
def test_a_damaged_configuration_is_one_line(folder, content):
    (folder.path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: ") as caught:
        folder.config_data()
    assert "\n" not in str(caught.value)


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


def test_a_place_that_takes_no_folder_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=r"file/run: could not be written: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", RunConfig())


def test_what_is_no_run_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"not a run folder"):
        RunFolder.open(tmp_path)


def test_a_run_without_checkpoints_goes_on_from_nothing_with_its_seed(folder):
    assert folder.find_start().state == RunState.new(3)
    assert folder.find_start().notes == ()


def test_a_checkpoint_holds_the_state(folder):
    save(folder, 2)
    save(folder, 10)
    assert folder.steps() == [2, 10]
    assert folder.find_start().state == folder.latest_state() == state(10)
    assert folder.find_start().notes == ()
    assert folder.state(2) == state(2)
    assert folder.policy() == folder.checkpoint(10) / "policy"
    assert folder.policy(2) == folder.checkpoint(2) / "policy"


def test_a_checkpoint_that_was_sealed_before_its_end_is_the_same(folder):
    with folder.new_checkpoint(state(1)) as new:
        (new.path / "weights").write_bytes(b"weights")
        assert list(new.seal()) == ["weights"]
    assert folder.find_start().state == state(1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00")


def be_of_another_step(path: Path) -> None:
    path.write_bytes((path.parent.parent / "step_4" / "manifest.json").read_bytes())


ACCIDENTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("learner/rank_0", cut, "learner/rank_0 is 12 bytes shorter than it was written"),
    ("learner/rank_0", flip, "learner/rank_0 is not what was written"),
    ("policy/weights", Path.unlink, "policy/weights is missing"),
    ("manifest.json", half, "manifest.json is not what was written"),
    ("manifest.json", garble, "manifest.json is not what was written"),
    ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json is not what was written"),
    ("manifest.json", lambda path: path.write_text("{}"), "manifest.json holds no state of a run"),
    ("manifest.json", lambda path: path.write_text('{"step": "x"}'), "manifest.json holds no state of a run"),
    ("manifest.json", lambda path: path.write_text("[[]]"), "manifest.json is not what was written"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", be_of_another_step, "manifest.json is that of step 4"),
]


@pytest.mark.parametrize(("name", "accident", "said"), ACCIDENTS)
def test_the_newest_whole_checkpoint_is_used_and_what_is_wrong_with_newer_ones_is_said(saved, name, accident, said):
    accident(saved.checkpoint(8) / name)
    start = saved.find_start()
    assert start.state == state(4)
    assert start.notes == (f"step 8: {said}; going on from step 4",)


def test_several_damaged_checkpoints_are_each_said(saved):
    save(saved, 12)
    cut(saved.checkpoint(8) / "policy/weights")
    garble(saved.checkpoint(12) / "manifest.json")
    start = saved.find_start()
    assert start.state == state(4)
    assert [note.partition(":")[0] for note in start.notes] == ["step 12", "step 8"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(saved):
    for step in (4, 8):
        cut(saved.checkpoint(step) / "learner/rank_0")
    with pytest.raises(RunError, match=r"no checkpoint is whole: step 8: .*; step 4: .*; bring one back from a copy"):
        saved.find_start()


def test_a_state_whose_manifest_is_damaged_is_one_line(saved):
    half(saved.checkpoint(8) / "manifest.json")
    with pytest.raises(ConfigError, match=r"step_8: manifest\.json is not what was written"):
        saved.state(8)


def test_the_newest_whole_policy_is_used_and_another_one_warned_of(saved, caplog):
    flip(saved.checkpoint(8) / "policy/weights")
    with caplog.at_level(logging.WARNING):
        assert saved.policy() == saved.checkpoint(4) / "policy"
    assert "step 8: policy/weights is not what was written; using step 4" in caplog.text
    with pytest.raises(ConfigError, match=r"step_8: policy/weights is not what was written; use another step"):
        saved.policy(8)


def test_a_policy_needs_no_learner(saved):
    cut(saved.checkpoint(8) / "learner/rank_0")
    assert saved.policy() == saved.policy(8) == saved.checkpoint(8) / "policy"


def test_no_whole_policy_is_one_line(saved):
    for step in (4, 8):
        (saved.checkpoint(step) / "policy/weights").unlink()
    with pytest.raises(ConfigError, match=r"step 8: policy/weights is missing; step 4: policy/weights is missing"):
        saved.policy()


def test_a_checkpoint_of_an_older_version_is_used_unchecked_and_that_is_said(folder):
    path = folder.checkpoint(2)
    path.mkdir()
    old = {"step": 2, "policy_version": 2, "position": 8, "pending_positions": [1, 5], "seed": 3, "config_sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(old))
    start = folder.find_start()
    assert start.state == replace(state(2), trained=0, dropped={})
    assert start.notes == ("step 2: saved by an older version without digests; its files could not be checked",)


def test_the_manifest_lists_every_file_and_the_configuration(saved):
    manifest = json.loads((saved.checkpoint(8) / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "learner/rank_0": 9000,
        "learner/rank_1": 50,
        "policy/weights": 5000,
    }
    config = (saved.path / "config.yaml").read_bytes()
    assert manifest["config_sha256"] == hashlib.sha256(config).hexdigest()


@pytest.mark.parametrize(
    ("error", "seen", "said"),
    [
        (OSError(28, "No space left on device"), NotWritten, r"step_2: could not be written: No space left on device"),
        (NotWritten("learner: full"), NotWritten, "learner: full"),
        (DeadlineExceeded("waited 5 s for the ranks"), DeadlineExceeded, "waited 5 s for the ranks"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_of_a_checkpoint_that_failed_amid_nothing_is_left(folder, error, seen, said):
    save(folder, 1)

    def fail_amid() -> None:
        with folder.new_checkpoint(state(2)) as new:
            (new.path / "policy").mkdir()
            raise error

    with pytest.raises(seen, match=said):
        fail_amid()
    assert folder.find_start().state == state(1)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step_1"]
    with pytest.raises(ConfigError, match=r"no complete checkpoint of step 2; there are: 1"):
        folder.state(2)


@pytest.mark.parametrize("large", ["learner", "manifest"])
def test_a_checkpoint_that_finds_no_room_is_said_and_the_older_one_stays_whole(folder, large):
    save(folder, 1)
    pending = 10 if large == "learner" else 10_000
    said = with_little_room(
        folder.path,
        f"""
        from ray_rl.run_state import RunFolder, RunState
        state = RunState(step=2, policy_version=2, position=9, pending_positions=tuple(range({pending})), seed=3)
        try:
            with RunFolder.open(Path(".")).new_checkpoint(state) as new:
                (new.path / "learner").write_bytes(bytes({10_000 if large == "learner" else 10}))
        except NotWritten as error: print(error)
        """,
    )
    assert said.startswith(f"{folder.checkpoint(2)}: could not be written: File too large")
    assert folder.find_start().state == state(1)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step_1"]


def test_a_process_killed_while_saving_leaves_no_checkpoint(folder):
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom ray_rl.run_state import RunFolder, RunState\n"
        f"folder = RunFolder.open(Path({str(folder.path)!r}))\n"
        "with folder.new_checkpoint(RunState.new(0)) as new:\n"
        "    (new.path / 'policy').mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert folder.steps() == []
    assert folder.find_start().notes == ()
    assert folder.prune(1, 0) == []
    assert list((folder.path / "checkpoints").iterdir()) == []


def test_a_step_can_be_saved_again(folder):
    save(folder, 1)
    with folder.new_checkpoint(state(1)) as new:
        (new.path / "new").touch()
    assert (folder.checkpoint(1) / "new").exists()
    assert not (folder.checkpoint(1) / "policy").exists()
    assert folder.find_start().state == state(1)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step_1"]


def test_pruning_keeps_the_newest(folder):
    for step in (9, 10, 11):
        save(folder, step)
    assert folder.prune(2, 11) == []
    assert folder.steps() == [10, 11]


def test_pruning_removes_what_is_later_than_the_run_and_what_was_never_completed(folder):
    for step in (2, 4, 6, 8):
        save(folder, step)
    cut(folder.checkpoint(8) / "learner/rank_0")
    (folder.checkpoint(6) / "manifest.json").unlink()
    (folder.path / "checkpoints" / "step_10.partial").mkdir()
    assert folder.prune(1, 4) == []
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step_4"]


def test_what_cannot_be_deleted_is_said_and_no_error(folder, monkeypatch):
    for step in (1, 2):
        save(folder, step)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert folder.prune(1, 2) == [f"{folder.checkpoint(1)}: could not be deleted: Permission denied"]
    assert folder.steps() == [1, 2]


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


def test_an_error_under_the_lock_is_no_fault_of_the_lock(folder):
    with pytest.raises(TimeoutError), folder.locked():
        raise TimeoutError


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


def test_of_a_run_that_never_began_the_logs_of_its_actors_are_kept_and_the_next_one_may_begin_there(tmp_path):
    folder = RunFolder.create(tmp_path / "run", RunConfig())
    folder.logs.mkdir()
    (folder.logs / "driver.log").write_text("begins\n")
    (folder.logs / "rollout-0.log").write_text("no such device\n")
    folder.remove_unused()
    assert [path.name for path in folder.path.iterdir()] == ["logs"]
    again = RunFolder.create(folder.path, RunConfig())
    assert (again.logs / "rollout-0.log").read_text() == "no such device\n"
    (again.logs / "rollout-0.log").unlink()
    again.remove_unused()
    assert not folder.path.exists()


def test_a_run_may_begin_where_another_died_in_its_beginning(tmp_path):
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / ".config.yaml.123").touch()
    RunFolder.create(path, resolve_config({}))
    assert RunFolder.is_run(path)
    with pytest.raises(ConfigError, match="is not empty; go on with it"):
        RunFolder.create(path, resolve_config({}))
    (path / "config.yaml").unlink()
    (path / "checkpoints" / "step_1").mkdir()
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
        RunFolder.create(path, resolve_config({}))
