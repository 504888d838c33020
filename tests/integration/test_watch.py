"""A live run, watched from outside: what Prometheus would scrape from it."""

import json
import time
import urllib.request
from pathlib import Path

import pytest

from tests.dashboard import expressions, metric_names
from tests.running import SMALL, STEP_SECONDS, training

pytestmark = pytest.mark.integration

EXPORT_SECONDS = 40.0
"""Ray exports every 10 s."""


def scraped(folder: Path) -> str:
    (group,) = json.loads((folder / "prometheus.json").read_text())
    (target,) = group["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples_of(folder: Path) -> set[str]:
    """Names of metrics that have a value of this run."""
    lines = [line for line in scraped(folder).splitlines() if f'run="{folder.name}"' in line]
    return metric_names(line.partition("{")[0] for line in lines)


def test_a_live_run_exports_every_metric_that_the_dashboard_uses(tmp_path):
    wanted = metric_names(expressions())
    with training(tmp_path / "run") as run:
        run.start("laptop-vineppo", *SMALL, "training.steps=1000", "evaluation.at_start=true", "evaluation.problems=8")
        run.wait_for_step(1, STEP_SECONDS)
        until = time.monotonic() + EXPORT_SECONDS
        while (missing := wanted - samples_of(run.folder)) and time.monotonic() < until:
            time.sleep(1)
        assert not missing
        assert run.interrupt(60) == 130
        assert run.survivors(20) == []
    assert not (run.folder / "prometheus.json").exists()
