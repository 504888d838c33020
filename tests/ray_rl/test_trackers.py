"""Trackers: with the libraries themselves where they are installed, and with ones that fail, hang or talk."""

import json
import sqlite3
import time
from contextlib import suppress
from importlib import util
from pathlib import Path

import psutil
import pytest

from ray_rl.config import RunConfig, resolve_config
from ray_rl.errors import ConfigError
from ray_rl.trackers import Trackers

SENTINEL = "sentinel-c0ffee99"


def installed(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(util.find_spec(module) is None, reason=f"{module} is not installed; CI tests wandb")


def config_of(*trackers: dict) -> RunConfig:
    return resolve_config({"name": "tracked", "logging": {"trackers": list(trackers)}})


def track(config: RunConfig, folder: Path, *steps: tuple[int, dict[str, float]], **limits) -> list[str]:
    """Warnings of a sitting that logs these steps."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    warnings: list[str] = []
    trackers = Trackers(config, folder, warnings.append, **limits)
    for step, metrics in steps:
        trackers.log(step, metrics)
    trackers.close()
    return warnings


STEPS = ((1, {"reward/mean": 0.25, "timing/step": float("nan")}), (2, {"reward/mean": 0.5, "eval/pass@1": 0.75}))


@installed("wandb")
def test_wandb_has_the_metrics_and_the_options_and_finds_its_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SENTINEL)
    config = config_of({"kind": "wandb", "offline": True, "tags": ["mine"]})
    assert track(config, tmp_path / "run", *STEPS) == []
    assert track(config, tmp_path / "run", (3, {"reward/mean": 0.625})) == []
    sittings = sorted((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in sittings}) == 1
    content = b"".join(path.read_bytes() for path in sittings)
    for part in (b"reward/mean", b"0.25", b"0.625", b"eval/pass@1", b"prompts_per_step", b"mine", b"tracked"):
        assert part in content
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if SENTINEL.encode() in path.read_bytes()]


@installed("trackio")
def test_trackio_has_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = config_of({"kind": "trackio", "project": "tests"})
    assert track(config, tmp_path / "run", *STEPS) == []
    assert track(config, tmp_path / "run", (3, {"reward/mean": 0.625})) == []
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(metrics)["reward/mean"]) for name, step, metrics in rows] == [
        ("run", 1, 0.25),
        ("run", 2, 0.5),
        ("run", 3, 0.625),
    ]


@installed("mlflow")
def test_mlflow_has_the_metrics_and_the_options_and_finds_its_run_again(tmp_path):
    from mlflow import MlflowClient

    place = f"sqlite:///{tmp_path}/mlflow.db"
    config = config_of({"kind": "mlflow", "tracking_uri": place, "tags": ["team=a", "mine"]})
    assert track(config, tmp_path / "run", *STEPS, close_seconds=60) == []
    assert track(config, tmp_path / "run", (3, {"reward/mean": 0.625}), close_seconds=60) == []
    client = MlflowClient(place)
    (run,) = client.search_runs([client.get_experiment_by_name("ray-rl").experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.25), (2, 0.5), (3, 0.625)]
    assert run.data.metrics["eval/pass_at_1"] == 0.75
    assert run.data.params["training.prompts_per_step"] == "32"
    assert (run.data.tags["team"], run.data.tags["mine"]) == ("a", "")
    assert run.info.run_name == "run"


def with_library(folder: Path, monkeypatch, source: str) -> None:
    """A trackio that does as it is told."""
    folder.mkdir()
    (folder / "trackio.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


WORKS = "def init(**options): pass\ndef log(metrics, step): pass\ndef finish(): pass\n"


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    source = WORKS + "def init(**options):\n    import os\n    raise OSError('refused: ' + os.environ['HF_TOKEN'])\n"
    with_library(tmp_path / "library", monkeypatch, source)
    warnings: list[str] = []
    (tmp_path / "logs").mkdir()
    trackers = Trackers(config_of({"kind": "trackio"}), tmp_path, warnings.append)
    until = time.monotonic() + 30
    while not warnings and time.monotonic() < until:
        trackers.log(1, {"reward/mean": 0.0})
        time.sleep(0.05)
    trackers.log(2, {"reward/mean": 0.0})
    trackers.close()
    (warning,) = warnings
    assert warning.startswith(
        "logging.trackers: trackio gets no more metrics: OSError: refused: [secret]; the run goes on"
    )
    log = (tmp_path / "logs" / "tracker-trackio.log").read_text()
    assert "refused: [secret]" in log
    assert SENTINEL not in log


def test_a_tracker_that_fails_at_the_very_end_is_told_of_too(tmp_path, monkeypatch):
    with_library(tmp_path / "library", monkeypatch, WORKS + "def finish():\n    raise OSError('no answer')\n")
    (warning,) = track(config_of({"kind": "trackio"}), tmp_path, *STEPS)
    assert "gets no more metrics: OSError: no answer" in warning


def test_a_tracker_that_hangs_costs_its_seconds_at_the_end_and_nothing_before(tmp_path, monkeypatch):
    with_library(
        tmp_path / "library", monkeypatch, WORKS + "def init(**options):\n    import time\n    time.sleep(600)\n"
    )
    steps = [(step, {f"a/{index}": 0.5 for index in range(1000)}) for step in range(100)]
    started = time.monotonic()
    warnings = track(config_of({"kind": "trackio"}), tmp_path, *steps, most_pending=100_000, close_seconds=2)
    assert time.monotonic() - started < 10
    crowded, late = warnings
    assert "trackio does not keep up, and some metrics are left out" in crowded
    assert "trackio to send what it has, and it did not come" in late


def test_a_job_that_is_stopped_still_sends_its_last_metrics(tmp_path, monkeypatch):
    source = WORKS + (
        f"def log(metrics, step):\n    import pathlib\n    pathlib.Path({str(tmp_path)!r}, f'step-{{step}}').touch()\n"
    )
    with_library(tmp_path / "library", monkeypatch, source)
    warnings: list[str] = []
    (tmp_path / "logs").mkdir()
    trackers = Trackers(config_of({"kind": "trackio"}), tmp_path, warnings.append)
    trackers.log(1, {"reward/mean": 0.0})
    until = time.monotonic() + 30
    while not (tmp_path / "step-1").exists() and time.monotonic() < until:
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # what other tests have left may be ending, or have ended
            if "ray_rl.tracker_process" in process.cmdline():
                process.terminate()
    trackers.log(2, {"reward/mean": 0.0})
    trackers.close()
    assert warnings == []
    assert (tmp_path / "step-2").exists()


def test_what_a_tracker_prints_lies_in_its_log(tmp_path, monkeypatch):
    with_library(
        tmp_path / "library", monkeypatch, WORKS + "def init(**options):\n    print('see https://there/run')\n"
    )
    assert track(config_of({"kind": "trackio"}), tmp_path, *STEPS) == []
    assert "see https://there/run" in (tmp_path / "logs" / "tracker-trackio.log").read_text()


def test_the_processes_leave_nothing_behind(tmp_path, monkeypatch):
    source = WORKS + (
        "def init(**options):\n    import subprocess, pathlib\n"
        f"    child = subprocess.Popen(['sleep', '600'])\n    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(child.pid))\n"
    )
    with_library(tmp_path / "library", monkeypatch, source)
    assert track(config_of({"kind": "trackio"}), tmp_path, *STEPS) == []
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child)


@pytest.mark.parametrize(
    ("trackers", "fault"),
    [
        ("[x]", "logging.trackers.0: Input tag 'x'"),
        ("[{kind: mlflow, tracking_uri: 'https://me:pass@host'}]", "logging.trackers.0.tracking_uri: holds a password"),
        ("[{kind: wandb, api_key: abc}]", "logging.trackers.0.api_key: is called like a secret"),
    ],
)
def test_a_tracker_that_is_not_known_or_told_a_secret_is_refused(trackers, fault):
    with pytest.raises(ConfigError, match=fault.replace("[", r"\[")):
        resolve_config({}, [f"logging.trackers={trackers}"])
