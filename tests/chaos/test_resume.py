"""6 steps in one sitting, and 6 steps of which a kill undoes some: the same prompts, seeds, schedules and ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ray_rl.recorder import read_groups
from tests.running import SMALL, STEP_SECONDS, audited, metrics, reward_file, trained_steps, training

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

STEPS = 6
SAVED = 3


def test_a_resumed_run_sees_and_becomes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    overrides = [*SMALL, "deterministic=true", f"training.steps={STEPS}", f"checkpoint.every={SAVED}"]
    overrides.append(reward_file(tmp_path, 0.1))
    with training(tmp_path / "whole") as whole:
        whole.start("laptop-grpo", *overrides)
        assert whole.wait_for_end(STEP_SECONDS) == 0
    with training(tmp_path / "broken") as broken:
        broken.start("laptop-grpo", *overrides)
        broken.wait_for_step(SAVED + 1, STEP_SECONDS)
        broken.kill(broken.parts("driver")[0])
        assert broken.last_step < STEPS
        broken.resume()
        assert broken.wait_for_end(STEP_SECONDS) == 0
        assert min(seen.step for seen in broken.steps[-(STEPS - SAVED) :]) == SAVED + 1

    assert trained_steps(broken.folder) == trained_steps(whole.folder) == list(range(1, STEPS + 1))
    assert ledger(broken.folder) == ledger(whole.folder)
    assert audited(broken.folder) == audited(whole.folder)
    assert rates(broken.folder) == rates(whole.folder)
    # The same seeds give the same tokens: that rounding in another batch decides one happens in one of a million.
    assert sampled(broken.folder) == sampled(whole.folder)
    assert len(sampled(whole.folder)) == 4 * STEPS
    weights, expected = (load_file(run.folder / "final" / "model.safetensors") for run in (broken, whole))
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-4


def ledger(folder: Path) -> str:
    return (folder / "ledger.jsonl").read_text()


def rates(folder: Path) -> list[float]:
    return [line["policy/lr"] for line in metrics(folder) if "timing/step" in line]


def sampled(folder: Path) -> dict[tuple[int, str], list[Any]]:
    """Step and prompt -> tokens of its completions."""
    return {
        (group["step"], group["prompt_id"]): [trajectory["token_ids"] for trajectory in group["trajectories"]]
        for group in read_groups(folder / "groups.jsonl")
    }
