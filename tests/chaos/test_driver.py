"""A run whose driver is killed, and what a killed driver, a full disk or a bad one may leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_rl.recorder import read_groups
from tests.running import SMALL, STEP_SECONDS, audited, reward_file, shared_memory_files, trained_steps, training

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


def test_a_killed_driver_leaves_no_process_and_the_run_goes_on_at_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    before = shared_memory_files()
    with training(tmp_path / "run") as run:
        overrides = ["training.steps=500", "training.max_staleness=1", "checkpoint.every=1", "checkpoint.keep=3"]
        run.start("laptop-grpo", *SMALL, *overrides, reward_file(tmp_path, 0.05))
        run.wait_for_step(5, STEP_SECONDS)
        run.kill(run.parts("driver")[0])
        # Ray's own two agents look for their dead head for another minute; they are gone at the end.
        assert [process for process in run.survivors(15) if "Agent" not in process] == []

        newest, older = damage_newest_checkpoint(run.folder)
        cut_in_the_middle_of_the_last_line(run.folder / "metrics.jsonl")
        cut_in_the_middle_of_the_last_line(run.folder / "groups.jsonl")

        run.resume(f"training.steps={newest + 2}")
        assert run.wait_for_end(STEP_SECONDS) == 0
        assert f"step {newest}: " in run.printed
        assert f"going on from step {older}" in run.printed
        assert run.survivors(20) == []
    assert shared_memory_files() <= before
    assert trained_steps(run.folder) == list(range(1, newest + 3))
    assert audited(run.folder).trained == 4 * (newest + 2)
    positions = [int(group["prompt_id"].partition(":")[0]) for group in read_groups(run.folder / "groups.jsonl")]
    assert len(positions) == len(set(positions)) == 4 * (newest + 2)


def damage_newest_checkpoint(folder: Path) -> tuple[int, int]:
    """Cut its largest file in half; its step, and that of the checkpoint before it."""
    checkpoints = {int(path.name.removeprefix("step_")): path for path in (folder / "checkpoints").glob("step_*[0-9]")}
    older, newest = sorted(checkpoints)[-2:]
    largest = max((p for p in checkpoints[newest].rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    cut(largest, largest.stat().st_size // 2)
    return newest, older


def cut_in_the_middle_of_the_last_line(path: Path) -> None:
    cut(path, path.stat().st_size - 20)


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)
