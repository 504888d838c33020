"""A run at a URL, with two ranks, from its beginning to the use of its policy; no sitting has files of the one before."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from safetensors import safe_open

from ray_rl.object_store import ObjectStore
from ray_rl.stored_run import StoredRun
from tests.running import SMALL

pytestmark = pytest.mark.integration

RANKS = ("learner.ranks=2", "learner.zero_stage=1", "rollout.num_actors=1", "checkpoint.every=2", "checkpoint.keep=1")
SECONDS = 200.0


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """Where the processes keep what is only theirs."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ObjectStore:
    """A folder here; or below RAY_RL_TEST_STORE, a URL, with its credentials in the environment."""
    base = os.environ.get("RAY_RL_TEST_STORE", f"file://{tmp_path_factory.mktemp('store')}")
    return ObjectStore.of(f"{base}/{uuid.uuid4().hex}")


def run(scratch: Path, *arguments: str) -> str:
    call = [sys.executable, "-m", "ray_rl", *arguments]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def finished(store, scratch) -> ObjectStore:
    """Two steps and, on what is another machine as far as the run can tell, the third."""
    first = run(scratch, "train", "laptop-grpo", *SMALL, *RANKS, "training.steps=2", "--run-dir", store.url)
    assert f"ray-rl export {store.url} DIR" in first
    assert {name.split("/")[1] for name in store.sizes() if name.startswith("checkpoints/")} == {"step_2"}
    assert leftovers(scratch) == []
    run(scratch, "train", "laptop-grpo", *SMALL, *RANKS, "training.steps=3", "--run-dir", store.url, "--continue")
    return store


def leftovers(scratch: Path) -> list[str]:
    return [path.name for path in scratch.iterdir() if path.name.startswith("ray-rl-")]


def test_it_goes_on_at_the_step_after_the_checkpoint(finished, scratch):
    steps = [json.loads(line) for line in finished.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert StoredRun.found(finished).steps() == [3]
    shards = [name for name in finished.sizes() if name.endswith("_optim_states.pt")]
    assert len(shards) == 2
    assert leftovers(scratch) == []


def test_every_file_is_what_the_manifest_says(finished):
    start = StoredRun.found(finished).find_start()
    assert (start.state.step, start.state.trained, start.notes) == (3, 12, ())


def test_the_policy_is_exported_and_evaluated_from_the_url(finished, scratch, tmp_path):
    run(scratch, "export", finished.url, str(tmp_path / "policy"))
    with safe_open(tmp_path / "policy" / "model.safetensors", "numpy") as weights:
        assert list(weights.keys())
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == finished.read("final/model.safetensors")
    report = tmp_path / "accuracy.json"
    run(scratch, "evaluate", finished.url, "evaluation.problems=8", "--json", str(report))
    assert 0 <= json.loads(report.read_text())["eval/pass@1"] <= 1
