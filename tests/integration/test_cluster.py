"""A cluster of three Ray nodes on this machine, and real jobs on it, submitted as a user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from benchmarks.training_process import PARTS
from ray_rl.run_state import RunFolder
from ray_rl.submission import Submission
from ray_rl.working_folder import WorkingFolder
from tests.ray_nodes import RayNodes, ray_nodes
from tests.running import SMALL, audited, metrics, shared_memory_files, trained_steps

pytestmark = [pytest.mark.integration, pytest.mark.timeout(360)]

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 30
START_SECONDS = 240.0
"""In which a run has begun: DeepSpeed compiles for a minute or two where it has never run with several ranks."""
ENGINE_SECONDS = 120.0
"""In which one more engine has started, beside two at work."""
STEP_SECONDS = 120.0
COMMAND_SECONDS = 60.0

REWARD = """
import time
from pathlib import Path

def score(prompt, completion, answer, metadata):
    if Path({held!r}).exists():
        time.sleep(0.4)
    return float(completion.rpartition("#")[2].strip() == answer)
"""
"""A step takes some seconds while a file is there."""
TELL = """
import os, pathlib
pathlib.Path({folder!r}, str(os.getpid())).touch()
"""
"""At the end of a package of ours: whoever imports it leaves its number."""
SAVES = """
import pathlib, signal, sys, time

def save(number, frame):
    time.sleep(6)
    pathlib.Path({folder!r}, "saved").touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
pathlib.Path({folder!r}, "begun").touch()
time.sleep(120)
"""
"""A program that takes longer to save than Ray would give it by itself."""


@dataclass
class User:
    """Somebody with a checkout, a cluster and storage that its nodes share."""

    nodes: RayNodes
    checkout: Path
    shared: Path
    jobs: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.shared / "run"

    @property
    def held(self) -> Path:
        """While it is there, steps are slow."""
        return self.shared / "held"

    @property
    def importers(self) -> set[int]:
        """Processes that have imported the copy of `ray_rl` that came with a job."""
        return {int(path.name) for path in (self.shared / "importers").iterdir()}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`ray-rl ARGUMENTS` in the checkout."""
        job = subprocess.Popen(
            [sys.executable, "-m", "ray_rl", *arguments],
            cwd=self.checkout,
            env={**os.environ, "PYTHONPATH": str(self.checkout), **self.nodes.environment, **environment},
            stdout=(self.shared / f"{len(self.jobs)}.out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.jobs.append(job)
        return job

    def printed(self, job: subprocess.Popen[str]) -> str:
        return (self.shared / f"{self.jobs.index(job)}.out").read_text(errors="replace")

    def call(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command that ends soon."""
        job = self.start(*arguments, **environment)
        return job.wait(COMMAND_SECONDS), self.printed(job)

    def shell(self, line: str) -> tuple[int, str]:
        """Exit code and output of a line that is typed in the checkout."""
        environment = {**os.environ, **self.nodes.environment, "PYTHONPATH": str(self.checkout)}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        done = subprocess.run(
            line, shell=True, cwd=self.checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start("submit", "--address", self.nodes.address, *arguments)

    def train(self) -> subprocess.Popen[str]:
        return self.submit(
            "mine/recipe.yaml",
            *SMALL,
            "rollout.num_actors=2",
            "rollout.max_tokens=64",
            # One on each of the two other nodes, and none beside the learner.
            "rollout.cpus_per_actor=2",
            "learner.ranks=2",
            "learner.cpus_per_rank=0.2",
            "reward={kind: python, function: 'mine/reward.py:score'}",
            "reward_actors.cpus_per_actor=0.1",
            f"training.steps={STEPS}",
            "checkpoint.every=10",
            "ray.placement_timeout=60",
            "--run-dir",
            str(self.run),
        )

    def wait_for(self, what: str, happened: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        job = self.jobs[0]
        while not happened():
            assert job.poll() is None, f"the job ended before {what}:\n{self.printed(job)}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}:\n{self.printed(job)}"
            time.sleep(0.3)

    def last(self, metric: str) -> float:
        steps = metrics(self.run) if (self.run / "metrics.jsonl").exists() else []
        return steps[-1].get(metric, 0.0) if steps else 0.0

    def end(self) -> None:
        for job in self.jobs:
            job.kill()
            job.wait(30)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Iterator[User]:
    """The cluster has a head with a CPU and two nodes with two."""
    shared = tmp_path_factory.mktemp("shared")
    with ray_nodes(shared) as nodes:
        nodes.start_head(cpus=1)
        nodes.add("first", cpus=2)
        nodes.add("second", cpus=2)
        user = User(nodes, checkout(tmp_path_factory.mktemp("work") / "checkout", shared), shared)
        try:
            yield user
        finally:
            user.end()


def checkout(folder: Path, shared: Path) -> Path:
    """A copy of this repository, with work of a user's in it."""
    for name in (*WorkingFolder.read(ROOT).files, ".gitignore", ".rayignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "mine").mkdir()
    shutil.copy(ROOT / "ray_rl" / "recipes" / "laptop-grpo.yaml", folder / "mine" / "recipe.yaml")
    (folder / "mine" / "reward.py").write_text(REWARD.format(held=str(shared / "held")))
    (shared / "importers").mkdir()
    with (folder / "ray_rl" / "__init__.py").open("a") as file:
        file.write(TELL.format(folder=str(shared / "importers")))
    overlap = folder / "benchmarks" / "overlap.py"
    text = overlap.read_text()
    assert "_GROUP_SECONDS = 0.4" in text
    overlap.write_text(text.replace("_GROUP_SECONDS = 0.4", "_GROUP_SECONDS = 0.01"))
    return folder


def test_a_run_on_three_nodes_is_scaled_up_loses_one_and_is_complete_at_its_end(user):
    before = shared_memory_files()
    user.held.touch()
    job = user.train()
    user.wait_for("a step with two actors", lambda: user.last("pool/actors") == 2, START_SECONDS)
    nodes = ("head", "first", "second")
    where = {name: [title(process) for process in user.nodes.running_on(name)] for name in nodes}
    assert [has(where[name], "rollout actor") for name in nodes] == [0, 1, 1], where
    assert has(where["head"], "learner") == 2, where
    parts = [one for name in nodes for one in user.nodes.running_on(name) if is_part(one)]
    assert [title(one) for one in parts if one.pid not in user.importers] == []

    user.nodes.add("third", cpus=2)
    code, answer = user.call("scale", str(user.run), "3")
    assert (code, "3 rollout actors" in answer) == (0, True), answer
    user.wait_for("three actors to serve", lambda: user.last("pool/actors") == 3, ENGINE_SECONDS)

    user.nodes.kill("first")
    user.wait_for("two actors to be left", lambda: user.last("pool/actors") == 2, STEP_SECONDS)
    asked = user.submit("--", "status", str(user.run))
    assert asked.wait(COMMAND_SECONDS) == 0, user.printed(asked)
    assert f"of {STEPS}, policy version" in user.printed(asked)
    user.held.unlink()
    assert job.wait(STEP_SECONDS) == 0, user.printed(job)

    assert trained_steps(user.run) == list(range(1, STEPS + 1))
    assert audited(user.run).trained == 4 * STEPS
    assert RunFolder.open(user.run).find_start().notes == ()
    assert (user.run / "final" / "model.safetensors").is_file()
    assert shared_memory_files() <= before


def test_the_same_submission_again_finds_the_run_complete(user):
    job = user.train()
    assert job.wait(COMMAND_SECONDS) == 0, user.printed(job)
    assert f"{user.run}: complete after {STEPS} steps" in user.printed(job)
    assert trained_steps(user.run) == list(range(1, STEPS + 1))


def test_a_benchmark_brings_its_report_back(user):
    report = user.shared / "report.json"
    job = user.submit("--json", str(report), "--", "bench", "overlap", "--quick")
    assert job.wait(COMMAND_SECONDS) == 0, user.printed(job)
    assert json.loads(report.read_text())["cases"]["overlap"]["step_over_max"]
    assert "ray-rl report" not in user.printed(job)


def test_a_jobs_own_refusal_and_rays_line_end_alike(user):
    job = user.submit("--", "status", "/nowhere or elsewhere")
    assert job.wait(COMMAND_SECONDS) == 2, user.printed(job)
    refusal = "error: /nowhere or elsewhere: not a run folder"
    assert refusal in user.printed(job)
    line = next(line for line in user.printed(job).splitlines() if line.startswith("the same"))
    code, printed = user.shell(line.removeprefix("the same"))
    assert code == 1
    assert refusal in printed


def test_a_job_that_is_stopped_gets_the_time_to_save(user):
    (user.checkout / "mine" / "saves.py").write_text(SAVES.format(folder=str(user.shared)))
    folder = WorkingFolder(path=user.checkout, files={})
    job = Submission(words=("python", "mine/saves.py"), folder=folder, submission_id="saves")
    line = job.line(user.nodes.address).replace("ray job submit", "ray job submit --no-wait")
    assert user.shell(line)[0] == 0
    deadline = time.monotonic() + COMMAND_SECONDS
    while not (user.shared / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.3)
    code, printed = user.shell(f"ray job stop --address {user.nodes.address} saves")
    assert code == 0, printed
    assert (user.shared / "saved").exists()


def test_who_has_not_the_token_is_turned_away_with_one_line(user):
    code, answer = user.call("submit", "--address", user.nodes.address, "--", "status", "/x", RAY_AUTH_MODE="disabled")
    assert code == 2
    assert answer.startswith(f"error: --address: {user.nodes.address} is no job server that lets this process in")
    assert "RAY_AUTH_MODE=token" in answer
    assert len(answer.splitlines()) == 1


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def has(titles: list[str], part: str) -> int:
    return sum(one.startswith(PARTS[part]) for one in titles)


def is_part(process: psutil.Process) -> bool:
    """Whether it is an actor of a run, or an engine."""
    return title(process).startswith(tuple(filter(None, PARTS.values())))
