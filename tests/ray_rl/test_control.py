"""The run's mailbox: what can be told without Ray, and then a driver and other processes through a real one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from ray.exceptions import GetTimeoutError, RayError

from ray_rl import control_client
from ray_rl.config import RunConfig
from ray_rl.control import CONTROL_FILE, Contact, ControlServer, pid_namespace, scale_pool
from ray_rl.control_client import NotRunning, ask_status, order_scale, share_environment
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import ConfigError, RunError
from ray_rl.mailbox import PERHAPS_OBEYED, Order, RunStatus
from ray_rl.run_state import RunFolder

ROOT = Path(__file__).resolve().parents[2]


class FakePool:
    """As much of a pool as an order changes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def resize(self, size: int) -> None:
        self.size = size


def everywhere(size: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (1, 3, "from 1 to 3 rollout actors; 2 are starting"),
        (2, 3, "from 2 to 3 rollout actors; 1 is starting"),
        (3, 2, "from 3 to 2 rollout actors; 1 ends when its groups are done"),
        (3, 1, "from 3 to 1 rollout actors; 2 end when their groups are done"),
        (2, 2, "2 rollout actors, as before"),
    ],
)
def test_an_order_changes_the_pool_and_says_what_happens(before, after, line):
    pool = FakePool(before)
    assert scale_pool(pool, after, everywhere) == line
    assert pool.size == after


def test_actors_without_a_place_are_told_of():
    assert scale_pool(FakePool(1), 4, lambda size: size - 2).endswith(
        "; the cluster has no place for 2 of the 4 at present"
    )


def test_a_cluster_that_does_not_say_what_it_has_leaves_the_pool_as_it_was():
    def breaks(size: int) -> int:
        raise ConnectionError("no answer")

    pool = FakePool(1)
    with pytest.raises(ConnectionError):
        scale_pool(pool, 4, breaks)
    assert pool.size == 1


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("too many"),
        RunError("too many"),
        RayError("too many"),
        RuntimeError("too many"),
        DeadlineExceeded("too many"),
        BrokenPipeError("too many"),
    ],
)
def test_an_order_that_goes_wrong_is_answered(tmp_path, error):
    def scale(size: int) -> str:
        raise error

    server = ControlServer(tmp_path, "test", status=RunStatus, scale=scale, warn=print)
    answer = server._obey(Order(number=1, size=2))
    assert not answer.accepted
    assert "too many" in answer.text


def test_an_order_whose_answer_does_not_come_may_still_be_carried_out(monkeypatch):
    def late(refs: object, timeout: float) -> object:
        raise GetTimeoutError("late")

    monkeypatch.setattr("ray.get", late)
    with pytest.raises(DeadlineExceeded, match=r"; the order may still be carried out; see ray-rl status$"):
        control_client._answer(Path("run"), None, otherwise=PERHAPS_OBEYED)


def test_nobody_can_want_no_actors():
    with pytest.raises(ConfigError, match="at least 1"):
        scale_pool(FakePool(1), 0, everywhere)


@pytest.fixture
def run(tmp_path) -> Path:
    return RunFolder.create(tmp_path / "run", RunConfig()).path


def contact(**known) -> Contact:
    own = psutil.Process()
    usual = {
        "address": "127.0.0.1:1",
        "namespace": "ray-rl",
        "name": "run-1",
        "environment": {},
        "host": socket.gethostname(),
        "pid": own.pid,
        "pid_namespace": pid_namespace(),
        "started": own.create_time(),
    }
    return Contact(**{**usual, **known})


def test_a_folder_where_no_run_goes_on_says_so(run):
    with pytest.raises(NotRunning, match=r"no run is going on here.*ray-rl train --resume"):
        ask_status(run)


def test_a_folder_that_is_no_runs_says_so(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        order_scale(tmp_path, 2)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"surprise": 1}'])
def test_a_damaged_control_file_is_one_line(run, content):
    (run / CONTROL_FILE).write_text(content)
    with pytest.raises(NotRunning, match=r"^[^\n]*control.json: cannot be read[^\n]*$"):
        ask_status(run)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"pid": 2**22 + 1}, "is no more"),
        ({"started": 1.0}, "is no more"),  # another process got the number
        ({}, "refused"),
        ({"host": "elsewhere", "pid": 2**22 + 1}, "refused"),
        ({"pid_namespace": "pid:[1]", "pid": 2**22 + 1}, "refused"),  # another container's number says nothing here
    ],
)
def test_what_a_killed_driver_left_is_recognised_without_ray(run, known, reason):
    (run / CONTROL_FILE).write_text(json.dumps(asdict(contact(**known))))
    with pytest.raises(NotRunning, match=rf"is gone \(.*{reason}.*\); go on with it"):
        ask_status(run)


@pytest.mark.parametrize(
    "known",
    [
        {"address": 1},
        {"address": "local"},  # Ray would start one
        {"name": None},
        {"environment": {"RAY_AUTH_MODE": 1}},
        {"environment": ["RAY_AUTH_MODE"]},
        {"pid": "1"},
        {"pid": True},
        {"pid": -1},
        {"pid_namespace": 1},
        {"started": "yesterday"},
    ],
)
def test_a_control_file_with_a_field_of_another_kind_is_one_line_that_names_it(run, known):
    (run / CONTROL_FILE).write_text(json.dumps(asdict(contact()) | known))
    with pytest.raises(NotRunning, match=rf"^[^\n]*control.json: cannot be read: {next(iter(known))}[^\n]*$"):
        ask_status(run)


def test_another_users_control_file_is_refused(run, monkeypatch):
    path = run / CONTROL_FILE
    path.write_text(json.dumps(asdict(contact())))
    if path.stat().st_uid == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"^[^\n]*control.json: belongs to another user \(\d+\)[^\n]*$"):
        ask_status(run)


def test_of_the_drivers_environment_only_what_lets_a_process_in_is_taken(run, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    given = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/token",
        "LD_PRELOAD": "evil.so",
        "RAY_ADDRESS": "evil:1",
    }
    before = dict(os.environ)
    share_environment(contact(environment=given))
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert changed == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/token"}


def test_fewer_than_one_actor_is_refused_before_anything_is_asked(run):
    with pytest.raises(ConfigError, match=r"^N: 0 rollout actors; use at least 1"):
        order_scale(run, 0)


DRIVER = """
import asyncio, sys
from pathlib import Path
import ray
from ray_rl.config import resolve_config
from ray_rl.control import ControlServer
from ray_rl.errors import ConfigError
from ray_rl.mailbox import RunStatus
from ray_rl.protocols import ActorStatus
from ray_rl.ray_session import ray_session

folder, wanted = Path(sys.argv[1]), 1

def status():
    actors = tuple(ActorStatus(name=f"actor {i}", state="serving", groups=1, served=2) for i in range(wanted))
    return RunStatus(name="driver", step=5, steps=9, phase="training", seconds_since_step=1.0, policy_version=5,
        buffer_depth=0, actors_wanted=wanted, actors=actors, actors_died=0, learner_restarts=0, ledger={"trained": 7},
        metrics={})

def scale(size):
    global wanted
    if size > 8:
        raise ConfigError(f"N: {size} is more than 8")
    before, wanted = wanted, size
    return f"from {before} to {size}"

async def main():
    async with ControlServer(folder, "test", status=status, scale=scale, warn=lambda text: print(text, flush=True)) as server:
        while not (folder / "end").exists():
            if (folder / "kill").exists() and server._mailbox is not None:
                (folder / "kill").unlink()
                ray.kill(server._mailbox)
            await asyncio.sleep(0.1)

with ray_session(resolve_config({})):
    asyncio.run(main())
"""


def appears(path: Path, driver: subprocess.Popen, *, gone: bool = False) -> None:
    """Wait until a file is there, or is gone."""
    deadline = time.monotonic() + 120
    while path.exists() == gone:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not {'vanish' if gone else 'appear'}"
        time.sleep(0.1)


def ray_rl(*arguments: str) -> subprocess.CompletedProcess:
    command: Sequence[str] = [sys.executable, "-m", "ray_rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)


@pytest.fixture
def driver(run) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        appears(run / CONTROL_FILE, process)
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.integration
def test_another_process_sees_the_run_and_changes_its_size_until_it_ends(run, driver):
    told = ray_rl("status", str(run), "--json")
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    assert json.loads(told.stdout)["actors_wanted"] == 1

    scaled = ray_rl("scale", str(run), "3")
    assert (scaled.returncode, scaled.stdout, scaled.stderr) == (0, "from 1 to 3\n", "")
    read = ray_rl("status", str(run)).stdout
    assert "driver: step 5 of 9" in read
    assert "actor 2  serving" in read

    refused = ray_rl("scale", str(run), "9")
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", "error: N: 9 is more than 8\n")

    (run / "end").touch()
    assert driver.wait(60) == 0
    assert not (run / CONTROL_FILE).exists()


@pytest.mark.integration
def test_a_mailbox_that_dies_is_made_anew_and_a_killed_drivers_is_recognised(run, driver):
    (run / "kill").touch()
    appears(run / CONTROL_FILE, driver, gone=True)
    appears(run / CONTROL_FILE, driver)
    assert json.loads((run / CONTROL_FILE).read_text())["name"] == "run-test-2"
    assert ray_rl("status", str(run)).returncode == 0

    driver.send_signal(signal.SIGKILL)
    driver.wait(30)
    began = time.monotonic()
    told = ray_rl("status", str(run))
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1
    assert "is gone (process" in told.stderr
    assert time.monotonic() - began < 20  # what Ray itself would wait for is minutes
