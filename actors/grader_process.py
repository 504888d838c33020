"""One grader process, seen from both ends: a child with a socket that answers one job at a time and that can be killed.

A grader may loop for ever, in C code, with signals ignored. Nothing short of killing its process stops it, so the
parent holds the clock. A process that was killed or died is replaced at the next job; starting one (imports take
seconds) never counts against a job's deadline.

This is a plain child with one socket, not a worker of a `concurrent.futures` or `pebble` pool: those share a queue and
a lock between workers, break for good when an idle worker is killed, and need helper processes that outlive the pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from actors.rewards import Verifier, final_answer_of, make_verifier
from ray_rl.config.reward import MathRewardConfig, PythonRewardConfig, ReasoningGymRewardConfig
from ray_rl.errors import RunError
from ray_rl.types import Reward, ScoringItem

PooledRewardConfig = MathRewardConfig | ReasoningGymRewardConfig | PythonRewardConfig
"""Rewards whose verifiers may hang or are a user's."""
Job = ScoringItem | str
"""What a grader process is asked: to score an item, or for the final answer in a text."""
START_TIMEOUT = 60.0
"""Seconds a grader process may take to import its verifier."""

T = TypeVar("T")
_SHOWN_CHARACTERS = 400
_PR_SET_PDEATHSIG = 1


class GraderStartError(RunError):
    """A grader process did not come up; the message says why."""


class GraderFailed(Exception):
    """A grader process gave no answer; the message is the reason that the record keeps."""


class GraderProcess:
    """The parent's end of one grader process. One thread starts and asks it, and must outlive it; any may close it."""

    def __init__(self, config: PooledRewardConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Start the process unless it runs, and wait until it has imported its verifier. Raises GraderStartError."""
        # An idle process says nothing: if there is something to read, it is the end of the connection.
        if self._connection is not None and not self._connection.poll(0):
            return
        self._end()
        try:
            connection = self._connection = self._spawn()
            connection.send(self._config)
            fault = connection.recv() if connection.poll(START_TIMEOUT) else f"silent for {START_TIMEOUT:g} s"
        except (EOFError, OSError) as error:
            raise GraderStartError(f"grader did not start: {self._end() or error}") from error
        if fault is not None:
            self._end()
            raise GraderStartError(f"grader did not start: {fault}")

    def ask(self, job: bytes, seconds: float) -> object:
        """The answer to a pickled `Job`. Starts the process first where needed, which `seconds` do not count.

        Raises:
            GraderFailed: no answer in time, or the process ended; either way it is gone.
            GraderStartError: it did not come up.
        """
        self.start()
        connection = self._connection
        assert connection is not None
        try:
            connection.send_bytes(job)
            answer = connection.recv() if connection.poll(seconds) else None
        except (EOFError, OSError) as error:
            raise GraderFailed(f"grader process died: {self._end()}") from error
        if answer is None:
            self._end()
            answer = GraderFailed(f"timeout: no verdict after {seconds:g} s")
        if isinstance(answer, GraderFailed):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the process, and never start another."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        with ours, theirs, self._lock:
            if self._closed:
                raise GraderStartError("grader did not start: the scorer is closed")
            program = f"from actors.grader_process import grader_main; grader_main({theirs.fileno()}, {os.getpid()})"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                pass_fds=[theirs.fileno()],
                # The child finds our code (and the user's) wherever this process found it.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                # A group of its own: what a grader starts is killed with it, and Ctrl-C is the parent's to handle.
                start_new_session=True,
            )
            return Connection(ours.detach())

    def _end(self) -> str:
        """Kill what may be left of the process. Returns how it ended, empty when there was none."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                _kill(process)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return ""
        code = process.returncode
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # else its number may be someone else's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- inside the grader process ---


def grader_main(descriptor: int, parent: int) -> None:
    """The program of a grader process: a config in, None or what is wrong out; then an answer for every job."""
    _die_with_parent(parent)
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        config = connection.recv()
        verifier = _guarded(lambda: make_verifier(config))
        connection.send(str(verifier) if isinstance(verifier, GraderFailed) else None)
        while not isinstance(verifier, GraderFailed):
            connection.send(_answer(config, verifier, connection.recv()))
    except EOFError:
        return  # the parent has closed its end


def _answer(config: PooledRewardConfig, verify: Verifier, job: Job) -> Reward | str | GraderFailed:
    return _guarded(lambda: final_answer_of(config, job) if isinstance(job, str) else verify(job))


def _guarded(work: Callable[[], T]) -> T | GraderFailed:
    try:
        return work()
    # A user's function and the libraries it calls may raise anything, sys.exit() included; here it becomes a value.
    except BaseException as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        return GraderFailed(f"{type(error).__name__}: {shortened(str(error))} ({place})")


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; a grader in a loop would notice nothing.

    Elsewhere than on Linux an idle process still ends with its connection, a looping one does not.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(0)


def shortened(text: str) -> str:
    """The text, without its middle when it is long: for logs and reasons."""
    half = _SHOWN_CHARACTERS // 2
    cut = len(text) - 2 * half
    return text if cut <= 0 else f"{text[:half]} [... {cut} characters ...] {text[-half:]}"
