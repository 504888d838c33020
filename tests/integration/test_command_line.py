"""The commands as a user types them, through Ray, vLLM and DeepSpeed: train, interrupt, resume, evaluate, export."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from ray_rl.recorder import read_groups

pytestmark = pytest.mark.integration

SMALL = [
    "training.prompts_per_step=4",
    "rollout.group_size=4",
    "values={kind: fixed, num_continuations: 2}",
    "learner.minibatch_size=8",
    "evaluation.problems=8",
    "logging.groups_per_step=4",
]
PUBLISHED = ("advantage.gae_lambda=0", "advantage.baseline_smoothing=0")
"""VinePPO's own advantages, whose sum is R - V(s_0); the recipe smooths them."""
MARK = "RAY_RL_TEST_RUN"


def start(*arguments: str, mark: str) -> subprocess.Popen:
    """`ray-rl` with an environment variable by which its descendants, reparented or not, can be found."""
    return subprocess.Popen(
        [sys.executable, "-m", "ray_rl", *arguments],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str, mark: str = "-") -> str:
    process = start(*arguments, mark=mark)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def survivors(mark: str) -> list[str]:
    """Processes that carry the mark, after a few seconds of grace for what is just ending."""
    deadline = time.monotonic() + 20
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:80])
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("ray-rl-*")}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(folder)):
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"step {step} never came:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a VinePPO run that got a Ctrl-C after its second step."""
    folder = tmp_path_factory.mktemp("runs") / "vineppo"
    mark = uuid.uuid4().hex
    before = shared_memory_files()
    process = start(
        "train", "laptop-vineppo", *SMALL, *PUBLISHED, "training.steps=500", "--run-dir", str(folder), mark=mark
    )
    wait_for_step(folder, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"train --resume {folder}" in output
    assert survivors(mark) == []
    # What an earlier process left may be swept meanwhile; this run must leave nothing of its own.
    assert shared_memory_files() <= before
    return folder


@pytest.fixture(scope="module")
def finished(interrupted) -> Path:
    """The same run, gone on with to its end."""
    last = max(line["step"] for line in metrics(interrupted))
    run("train", "--resume", str(interrupted), f"training.steps={last + 2}")
    return interrupted


def test_an_interrupted_run_has_a_checkpoint_of_its_last_step(interrupted):
    trained = [line["step"] for line in metrics(interrupted) if "timing/step" in line]
    steps = [int(path.name.removeprefix("step_")) for path in (interrupted / "checkpoints").iterdir()]
    assert max(steps) == max(trained)


def test_a_resumed_run_goes_on_at_the_next_step_and_visits_every_prompt_once(finished):
    lines = metrics(finished)
    steps = [line["step"] for line in lines if "timing/step" in line]
    assert steps == list(range(1, len(steps) + 1))
    positions = [int(group["prompt_id"].partition(":")[0]) for group in read_groups(finished / "groups.jsonl")]
    assert sorted(positions) == list(range(4 * len(steps)))


def test_engine_and_learner_agree_at_every_step(finished):
    steps = [line for line in metrics(finished) if "timing/step" in line]
    assert all(line["weights/probe_max_abs_diff"] < 1e-4 for line in steps)
    assert all(line["policy/rollout_train_logprobs_abs_diff_max"] < 1e-3 for line in steps)
    assert all(line["staleness/max"] == 0 for line in steps)


def test_recorded_groups_keep_the_identities(finished):
    groups = list(read_groups(finished / "groups.jsonl"))
    assert groups
    for group in groups:
        for trajectory in group["trajectories"]:
            boundaries = trajectory["boundaries"]
            assert boundaries[0] == 0
            assert boundaries[-1] == len(trajectory["token_ids"])
            assert "".join(trajectory["segments"]) == "".join(trajectory["tokens"])
            per_segment = [trajectory["advantages"][start] for start in boundaries[:-1]]
            assert math.isclose(sum(per_segment), trajectory["reward"] - trajectory["values"][0]["mean"], abs_tol=1e-9)
            assert {value["count"] for value in trajectory["values"]} == {2}


def test_every_span_carries_the_version_before_its_step(finished):
    for group in read_groups(finished / "groups.jsonl"):
        for trajectory in group["trajectories"]:
            assert trajectory["versions"] == [[group["step"] - 1, 0, len(trajectory["token_ids"])]]


def test_evaluate_takes_a_run_and_gives_pass_at_k(finished, tmp_path):
    file = tmp_path / "evaluation.json"
    run("evaluate", str(finished), "evaluation.samples=4", "evaluation.problems=16", "--json", str(file))
    measured = json.loads(file.read_text())
    assert 0 <= measured["eval/pass@1"] <= measured["eval/pass@2"] <= measured["eval/pass@4"] <= 1
    assert {"eval/majority@4", "eval/greedy"} <= measured.keys()
    assert measured["eval/problems"] == 16


def test_export_is_a_model_that_transformers_loads_with_the_trained_weights(finished, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ray_rl.embedded import policy_path

    run("export", str(finished), str(tmp_path / "policy"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    changes = [
        (after - before).abs().max().item()
        for after, before in zip(trained.parameters(), initial.parameters(), strict=True)
    ]
    assert max(changes) > 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([5]) is not None


def test_two_runs_side_by_side_do_not_collide_one_of_them_with_two_engines_and_two_ranks_under_zero_3(tmp_path):
    marks = [uuid.uuid4().hex, uuid.uuid4().hex]
    sizes = [[], ["rollout.num_actors=2", "learner.ranks=2", "learner.zero_stage=3"]]
    processes = [
        start(
            "train", "laptop-grpo", *(o for o in SMALL if not o.startswith("values")), "training.steps=2",
            *sizes[index], f"seed={index}", "--run-dir", str(tmp_path / str(index)), mark=mark,
        )
        for index, mark in enumerate(marks)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for index, mark in enumerate(marks):
        assert (tmp_path / str(index) / "final" / "model.safetensors").is_file()
        steps = [line for line in metrics(tmp_path / str(index)) if "timing/step" in line]
        assert all(line["weights/probe_max_abs_diff"] < 1e-4 for line in steps)
        assert survivors(mark) == []
