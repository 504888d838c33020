"""`ray-rl train` as a process: its steps as they come, the processes below it, and how one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

Part = Literal["rollout actor", "engine", "reward actor", "learner", "driver"]

PARTS: Mapping[Part, str] = {
    "rollout actor": "ray::RolloutActor",
    "engine": "VLLM::EngineCore",
    "reward actor": "ray::RewardActor",
    "learner": "ray::LearnerActor",
    "driver": "",
}
"""What a component's processes are called; the driver is the process that was started."""
_TAIL = 6000
"""Characters."""


class RunFailed(AssertionError):
    """A run did what it must not, or not in time; the message holds the end of what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenStep:
    """A training step, as soon as its line was complete in metrics.jsonl."""

    step: int
    at: float
    """Seconds of a monotonic clock."""
    metrics: Mapping[str, Any]


class TrainingProcess:
    """A run's driver, in one sitting or several."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started yet.

        Args:
            folder: of the run; what it prints goes into a file beside it.
        """
        self.folder = folder
        self.log = folder.with_name(folder.name + ".log")
        self.steps: list[SeenStep] = []
        """All that `look` has seen, those that were undone later included."""
        self.family: set[psutil.Process] = set()
        """Every process below the driver that `look` has seen, of all sittings."""
        self._seen: set[tuple[int, float]] = set()
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        """Of the present sitting."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def last_step(self) -> int:
        """Of the line seen last."""
        return self.steps[-1].step if self.steps else 0

    def start(self, recipe: str, *overrides: str) -> None:
        """A new run."""
        self._start("train", recipe, *overrides, "--run-dir", str(self.folder))

    def resume(self, *overrides: str) -> None:
        """The run goes on."""
        self._start("train", "--resume", str(self.folder), *overrides)

    def look(self) -> Sequence[SeenStep]:
        """Steps that are new since the last call; cheap enough for several times a second."""
        if self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                self.family.update(psutil.Process(self.process.pid).children(recursive=True))
        new = []
        for metrics in _complete_steps(self.folder / "metrics.jsonl"):
            # A step that is undone and done again is another one; its duration tells.
            key = (int(metrics["step"]), metrics["timing/step"])
            if key not in self._seen:
                self._seen.add(key)
                new.append(SeenStep(step=key[0], at=time.monotonic(), metrics=metrics))
        self.steps += new
        return new

    def wait_for(self, what: str, happened: Callable[[], bool], seconds: float) -> None:
        """Look until `happened()` is true.

        Raises:
            RunFailed: the process ended, or the seconds passed.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            if happened():
                return
            if self.process.poll() is not None:
                raise RunFailed(f"the run ended with {self.process.returncode} before {what}:\n{self.printed[-_TAIL:]}")
            if time.monotonic() > deadline:
                raise RunFailed(f"waited {seconds:g} s for {what}, and it did not come:\n{self.printed[-_TAIL:]}")
            time.sleep(0.2)

    def wait_for_step(self, step: int, seconds: float) -> None:
        """Look until a line of that step, or a later one, is there that was not there at the call."""
        before = len(self.steps)
        self.wait_for(f"step {step}", lambda: any(seen.step >= step for seen in self.steps[before:]), seconds)

    def parts(self, part: Part) -> list[psutil.Process]:
        """The living processes of a component."""
        try:
            driver = psutil.Process(self.process.pid)
            below = driver.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [driver] if part == "driver" else [one for one in below if _title(one).startswith(PARTS[part])]

    def kill(self, victim: psutil.Process) -> None:
        """SIGKILL to one of its processes."""
        victim.kill()
        if victim.pid == self.process.pid:
            self.process.wait(30)

    def wait_for_end(self, seconds: float) -> int:
        """The exit code of a run that ends by itself.

        Raises:
            RunFailed: it does not.
        """
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                raise RunFailed(f"waited {seconds:g} s for the run to end:\n{self.printed[-_TAIL:]}")
            time.sleep(0.2)
        self.look()
        return self.process.returncode

    def interrupt(self, seconds: float) -> int:
        """Ctrl-C; the exit code. Raises as `wait_for_end`."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.wait_for_end(seconds)

    @property
    def printed(self) -> str:
        """All that the run printed, in all sittings."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def survivors(self, seconds: float) -> list[str]:
        """Processes of the run that still live after so many seconds of grace."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        return [f"{one.pid} {_title(one)}" for one in alive if one.is_running() and _title(one)]

    def end(self) -> None:
        """Leave no process of it."""
        if self._process is None:
            return
        self.look()
        self._process.kill()
        self._process.wait(30)
        for one in self.family:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def _start(self, *arguments: str) -> None:
        with self.log.open("a") as log:
            self._process = _spawn(arguments, log)


def _spawn(arguments: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_rl", *arguments]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def _complete_steps(path: Path) -> list[dict[str, Any]]:
    """Lines of training steps that are done; the last line may just be written."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        if "timing/step" in metrics:
            found.append(metrics)
    return found


def _title(process: psutil.Process) -> str:
    """Empty for one that is gone, or a zombie."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
