"""A run whose parts are killed while it goes on: each comes back, the run ends by itself, and every prompt ended once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.training_process import Part, TrainingProcess
from tests.running import (
    SMALL,
    STEP_SECONDS,
    audited,
    command,
    reward_file,
    shared_memory_files,
    trained_steps,
    training,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(500)]

STEPS = 60


def test_each_part_that_is_killed_comes_back_and_every_prompt_ends_exactly_once(tmp_path: Path) -> None:
    before = shared_memory_files()
    with training(tmp_path / "run") as run:
        overrides = [f"training.steps={STEPS}", "training.max_staleness=1", "checkpoint.every=2"]
        run.start("laptop-grpo", *SMALL, *overrides, reward_file(tmp_path, 0.12))
        run.wait_for_step(2, STEP_SECONDS)

        kill(run, "engine")  # of the only rollout actor: the run waits for another one
        next_step(run)
        assert last(run, "pool/actors") == 1

        assert "2 rollout actors" in command("scale", str(run.folder), "2")
        run.wait_for("two actors to serve", lambda: last(run, "pool/actors") == 2, STEP_SECONDS)
        status = command("status", str(run.folder))
        assert len(re.findall(r"rollout actor \d+.*serving", status)) == 2, status

        kill(run, "rollout actor")
        run.wait_for("one actor to serve", lambda: last(run, "pool/actors") == 1, STEP_SECONDS)
        run.wait_for("two actors to serve", lambda: last(run, "pool/actors") == 2, STEP_SECONDS)

        kill(run, "reward actor")
        next_step(run)
        assert run.steps[-1].metrics["reward/failures"] == 0

        step = run.last_step
        kill(run, "learner")
        next_step(run)
        assert step - 2 <= run.steps[-1].step <= step + 2, "it goes on at its last checkpoint"
        assert last(run, "learner/restarts") == 1

        assert run.wait_for_end(STEP_SECONDS) == 0
        assert run.survivors(20) == []
    assert shared_memory_files() <= before
    assert trained_steps(run.folder) == list(range(1, STEPS + 1))
    assert (run.folder / "final" / "model.safetensors").is_file()
    assert audited(run.folder).trained == 4 * STEPS


def kill(run: TrainingProcess, part: Part) -> None:
    run.kill(run.parts(part)[0])


def next_step(run: TrainingProcess) -> None:
    run.wait_for_step(0, STEP_SECONDS)


def last(run: TrainingProcess, metric: str) -> float:
    return run.steps[-1].metrics[metric]
