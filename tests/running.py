"""Real runs as a user starts them, for the tests that look at them from outside or kill parts of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.training_process import TrainingProcess
from ray_rl.ledger import LedgerAudit, audit
from ray_rl.run_state import RunFolder

STEP_SECONDS = 200.0
"""No first step, and no recovery, takes longer on two cores."""
COMMAND_SECONDS = 120.0

SMALL = (
    "rollout.group_size=4",
    "rollout.kv_cache_gib=0.25",
    "learner.minibatch_size=8",
    "training.prompts_per_step=4",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "logging.tensorboard=false",
    "logging.groups_per_step=4",
)
"""Overrides of a laptop recipe: steps of a second or less."""
SLOW_REWARD = """
import time

def score(prompt, completion, answer, metadata):
    time.sleep({seconds})
    return float(completion.rpartition("#")[2].strip() == answer)
"""


@contextmanager
def training(folder: Path) -> Iterator[TrainingProcess]:
    """A run that leaves no process, however the test ends; what it printed is shown when that is by an error."""
    run = TrainingProcess(folder)
    try:
        yield run
    except BaseException:
        print(run.printed)
        raise
    finally:
        run.end()


def command(*arguments: str) -> str:
    """What a command that answers at once prints."""
    call = [sys.executable, "-m", "ray_rl", *arguments]
    done = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stdout
    return done.stdout


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("ray-rl-*")}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained_steps(folder: Path) -> list[int]:
    """In the order of the file."""
    return [line["step"] for line in metrics(folder) if "timing/step" in line]


def audited(folder: Path) -> LedgerAudit:
    """The run's ledger against its newest checkpoint; nothing is lost or there twice."""
    run = RunFolder.open(folder)
    found = audit(run.ledger, run.find_start().state)
    assert (found.lost, found.duplicated) == ((), ())
    return found


def reward_file(folder: Path, seconds: float) -> str:
    """An override: a reward that takes its time in a reward actor, so that a step does."""
    file = folder / "slow_reward.py"
    file.write_text(SLOW_REWARD.format(seconds=seconds))
    return f"reward={{kind: python, function: '{file}:score'}}"
