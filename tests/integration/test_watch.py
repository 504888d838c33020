"""A live run, watched from outside: its metrics for Prometheus, its logs, its tracker, and that no secret lies in its folder."""

import json
import time
import urllib.request
from importlib import util
from pathlib import Path

import pytest

from tests.dashboard import expressions, metric_names
from tests.running import SMALL, STEP_SECONDS, training

pytestmark = pytest.mark.integration

EXPORT_SECONDS = 40.0
"""Ray exports every 10 s."""
SENTINEL = "sentinel-0b7e55d1c4"
TALKATIVE_REWARD = """
import itertools, logging, os

calls = itertools.count()

def score(prompt, completion, answer, metadata):
    logging.warning("graded with %s", os.environ["SERVICE_TOKEN"])
    if next(calls) % 3 == 0:
        raise RuntimeError("the service refused " + os.environ["SERVICE_TOKEN"])
    return float(completion.rpartition("#")[2].strip() == answer)
"""


def scraped(folder: Path) -> str:
    (group,) = json.loads((folder / "prometheus.json").read_text())
    (target,) = group["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples_of(folder: Path) -> set[str]:
    """Names of metrics that have a value of this run."""
    lines = [line for line in scraped(folder).splitlines() if f'run="{folder.name}"' in line]
    return metric_names(line.partition("{")[0] for line in lines)


def check_export(folder: Path) -> None:
    """Every metric that the dashboard uses is there."""
    wanted = metric_names(expressions())
    until = time.monotonic() + EXPORT_SECONDS
    while (missing := wanted - samples_of(folder)) and time.monotonic() < until:
        time.sleep(1)
    assert not missing


def check_logs(folder: Path) -> None:
    """Each component has its file."""
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert {"driver.log", "learner-0.log", "reward-0.log", "rollout-0.log"} <= set(logs)
    assert "run: step 1/1000  reward " in logs["driver.log"]
    assert "metrics for Prometheus: http://" in logs["driver.log"]
    assert "step 1 is trained" in logs["learner-0.log"]
    assert "policy version 1 is proven" in logs["rollout-0.log"]
    assert "never retrieved" not in logs["rollout-0.log"]
    assert "graded with [secret]" in logs["reward-0.log"]
    assert "grading failed: " in logs["reward-0.log"]


def check_tracker(folder: Path) -> None:
    """It has the metrics of the steps, and nothing was said against it."""
    (file,) = (folder / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    assert b"perf/tokens_per_second" in file.read_bytes()
    assert "logging.trackers" not in (folder / "logs" / "driver.log").read_text()


def check_secrecy(folder: Path) -> None:
    """The secret is in no file, although graders told it and failed with it."""
    assert "the service refused [secret]" in (folder / "groups.jsonl").read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SENTINEL.encode() in path.read_bytes()]


def test_a_live_run_exports_all_that_the_dashboard_shows_and_logs_each_component_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", SENTINEL)
    (tmp_path / "talkative.py").write_text(TALKATIVE_REWARD)
    overrides = [
        *SMALL,
        "training.steps=1000",
        "evaluation.at_start=true",
        "evaluation.problems=8",
        f"reward={{kind: python, function: '{tmp_path}/talkative.py:score', max_failure_share: 1}}",
    ]
    with_wandb = util.find_spec("wandb") is not None
    if with_wandb:
        overrides.append("logging.trackers=[{kind: wandb, offline: true}]")
    with training(tmp_path / "run") as run:
        run.start("laptop-vineppo", *overrides)
        run.wait_for_step(2, STEP_SECONDS)
        check_export(run.folder)
        assert run.interrupt(60) == 130
        assert run.survivors(20) == []
    assert not (run.folder / "prometheus.json").exists()
    check_logs(run.folder)
    if with_wandb:
        check_tracker(run.folder)
    check_secrecy(run.folder)
    assert SENTINEL not in run.printed
