"""Experiment trackers: metrics for wandb, trackio or MLflow, each in a process of its own (`ray_rl.tracker_process`).

    log --> pending lines --pipe--> process --library--> server

Nothing here waits for a tracker while the run goes on: what the pipe does not take stays pending, and what would be too much is
left out. A tracker that fails is told of once. At the end they get some seconds, all together, to send what they have.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_rl.config import RunConfig
from ray_rl.deadlines import Deadline, DeadlineExceeded, join
from ray_rl.redaction import redact, redacted
from ray_rl.run_logs import log_environment

_MOST_PENDING = 4 * 2**20
"""Bytes; a step has a few thousand."""
_PIPE = 2**20
"""Bytes, the most that Linux gives to everybody."""
_POLL_SECONDS = 0.05


class Trackers:
    """A `MetricSink` into all trackers of a run."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        warn: Callable[[str], None],
        *,
        most_pending: int = _MOST_PENDING,
        close_seconds: float = 20.0,
    ) -> None:
        """Start a process for each.

        Args:
            config: of the run; the trackers get it, without secrets.
            folder: of the run. A tracker's run is found again through `trackers/` in it, when the run is resumed.
            warn: told of trackers that fail.
            most_pending: bytes that may wait for one tracker.
            close_seconds: that all have at the end.
        """
        self._close_seconds = close_seconds
        self._trackers: list[_Tracker] = []
        plain = redacted(config.model_dump(mode="json"))
        kinds: Counter[str] = Counter()
        for options in config.logging.trackers:
            kinds[options.kind] += 1
            name = options.kind if kinds[options.kind] == 1 else f"{options.kind}-{kinds[options.kind]}"
            try:
                tracker = _Tracker(name, folder, warn, most_pending)
            except OSError as error:
                warn(f"logging.trackers: {name} gets no metrics: its process cannot be started: {error.strerror}")
                continue
            tracker.say({"name": name, "options": options.model_dump(), "folder": str(folder), "config": plain})
            self._trackers.append(tracker)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand on what is a number."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.say({"step": step, "metrics": finite})

    def rewind(self, step: int) -> None:
        """Nothing: a tracker takes nothing back. Steps that are done again come again, with the same numbers."""

    def close(self) -> None:
        """End the processes, which send what they have; those that are late are killed."""
        deadline = Deadline(self._close_seconds, what="the trackers to send what they have")
        while deadline.left and any(tracker.pending for tracker in self._trackers):
            time.sleep(_POLL_SECONDS)
        for tracker in self._trackers:
            tracker.say_the_end()
        for tracker in self._trackers:
            tracker.end(deadline.left)


class _Tracker:
    """The driver's end of one process."""

    def __init__(self, name: str, folder: Path, warn: Callable[[str], None], most_pending: int) -> None:
        self._name = name
        self._log = folder / "logs" / f"tracker-{name}.log"
        self._warn = warn
        self._most_pending = most_pending
        self._pending = bytearray()
        self._left_out = False
        self._lost = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ray_rl.tracker_process"],
            # It finds our code wherever this process found it.
            env={
                **os.environ,
                **log_environment(folder / "logs", f"tracker-{name}"),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A group of its own: Ctrl-C is the driver's to handle, and what a library started ends with it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for end in (self._input, self._output):
            os.set_blocking(end, False)
        with suppress(OSError):  # where the system allows less, it is less
            fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, _PIPE)

    @property
    def pending(self) -> bool:
        """Whether something waits, after another attempt to get rid of it."""
        self._flush()
        return bool(self._pending)

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message, now or with a later one; or leave it out."""
        if self._lost:
            return
        line = json.dumps(message).encode() + b"\n"
        if len(self._pending) + len(line) <= self._most_pending:
            self._pending += line
        elif not self._left_out:
            self._left_out = True
            self._tell("does not keep up, and some metrics are left out")
        self._flush()

    def say_the_end(self) -> None:
        """Nothing follows; what still waits never gets there."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self, seconds: float) -> None:
        """Wait for the process, and kill it and what it started when it is late."""
        try:
            join(self._process, seconds, what=f"{self._name} to send what it has")
        except DeadlineExceeded as error:
            self._tell(f"{error}; its last metrics may be missing there")
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if not self._lost and self._process.returncode:
            self._mourn()

    def _flush(self) -> None:
        try:
            while self._pending and not self._lost:
                del self._pending[: os.write(self._input, self._pending)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._mourn()

    def _mourn(self) -> None:
        self._lost = True
        self._pending.clear()
        try:
            reason = os.read(self._output, 2**16).decode(errors="replace").strip()
        except BlockingIOError:
            reason = ""
        self._tell(f"gets no more metrics: {reason or 'its process ended'}")

    def _tell(self, what: str) -> None:
        self._warn(f"logging.trackers: {self._name} {redact(what)}; the run goes on. More: {self._log}")
