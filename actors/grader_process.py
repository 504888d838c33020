"""One grader process, seen from both ends: a child with a socket that answers one job at a time and that can be killed.

A grader may loop for ever, in C code, with signals ignored. Nothing short of killing its process stops it, so the
parent holds the clock. A process that was killed or died is replaced at the next job; starting one (imports take
seconds) never counts against a job's deadline.

This is a plain child with one socket, not a worker of a `concurrent.futures` or `pebble` pool: those share a queue and
a lock between workers, break for good when an idle worker is killed, and need helper processes that outlive the pool.
It guards against accidents, not against attacks: what a grader started is killed with it, in whatever process group it is, but
a daemon, whose parent has ended, escapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from actors.grader_channel import Channel, ChannelBroken
from actors.rewards import Verifier, final_answer_of, make_verifier
from actors.verdicts import Answer, Failed, pack, shortened, unpack
from ray_rl.config.reward import MathRewardConfig, PythonRewardConfig, ReasoningGymRewardConfig
from ray_rl.errors import RunError
from ray_rl.run_logs import keep_log
from ray_rl.types import Reward, ScoringItem

PooledRewardConfig = MathRewardConfig | ReasoningGymRewardConfig | PythonRewardConfig
"""Rewards whose verifiers may hang or are a user's."""
Job = ScoringItem | str
"""What a grader process is asked: to score an item, or for the final answer in a text."""
START_TIMEOUT = 60.0
"""Seconds a grader process may take to import its verifier."""

T = TypeVar("T")
_END_SECONDS = 10.0
_GIB = 2**30
_PR_SET_PDEATHSIG = 1
_READY = ""
"""The first answer of a process that has imported its verifier."""


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
        self._channel: Channel | None = None

    def start(self) -> None:
        """Start the process unless it runs, and wait until it has imported its verifier. Raises GraderStartError."""
        # An idle process says nothing: if there is something to read, it is the end of it or an answer to nobody.
        if self._channel is not None and self._channel.is_silent():
            return
        self._end()
        until = time.monotonic() + START_TIMEOUT
        try:
            channel = self._channel = self._spawn()
            channel.send(pickle.dumps(self._config), until)
            answer = unpack(channel.receive(until))
        except TimeoutError as error:
            self._end()
            raise GraderStartError(f"grader did not start: silent for {START_TIMEOUT:g} s") from error
        except (ChannelBroken, OSError, ValueError) as error:
            raise GraderStartError(f"grader did not start: {self._end() or error}") from error
        if isinstance(answer, Failed):
            self._end()
            raise GraderStartError(f"grader did not start: {answer.reason}")

    def ask(self, job: bytes, seconds: float) -> Reward | str:
        """The answer to a pickled `Job`. Starts the process first where needed, which `seconds` do not count.

        Raises:
            GraderFailed: no answer in time, none that can be read, or the process ended (in each case it is gone); or
                the grader raised something.
            GraderStartError: it did not come up.
        """
        self.start()
        channel, until = self._channel, time.monotonic() + seconds
        assert channel is not None
        try:
            channel.send(job, until)
            answer = unpack(channel.receive(until))
        except TimeoutError as error:
            self._end()
            raise GraderFailed(f"timeout: no verdict after {seconds:g} s") from error
        except ChannelBroken as error:
            raise GraderFailed(f"grader process died: {self._end()}") from error
        except ValueError as error:
            self._end()
            raise GraderFailed(f"unreadable verdict: {error}") from error
        if isinstance(answer, Failed):
            if answer.spent:
                self._end()
            raise GraderFailed(answer.reason)
        return answer

    def close(self) -> None:
        """Kill the process, and never start another."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)

    def _spawn(self) -> Channel:
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
            return Channel(ours.dup())

    def _end(self) -> str:
        """Kill what may be left of the process. Returns how it ended, empty when there was none."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                _kill(process)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return "" if process is None else _how_it_ended(process.returncode)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # else its number may be someone else's by now
        started = _descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in started:
            with contextlib.suppress(psutil.Error):  # it is gone, or has become another user's
                child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system has not let go of it; it won't run on
            process.wait(_END_SECONDS)


def _descendants(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "cannot be killed"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (by the system when memory is short, or because it had closed its connection)"
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


# --- inside the grader process ---


def grader_main(descriptor: int, parent: int) -> None:
    """The program of a grader process: a config in, whether it can be served out; then an answer for every job."""
    _die_with_parent(parent)
    os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=descriptor))
    # A copy of this process that a verifier forks must neither answer nor hold the connection open when we are gone.
    os.register_at_fork(after_in_child=channel.close)
    keep_log()
    try:
        config = pickle.loads(channel.receive())
        verifier = _guarded(lambda: _limited_verifier(config), config)
        channel.send(pack(verifier if isinstance(verifier, Failed) else _READY))
        while not isinstance(verifier, Failed):
            channel.send(pack(_answer(config, verifier, channel.receive(most=sys.maxsize))))
    except ChannelBroken:
        return  # the parent has closed its end


def _limited_verifier(config: PooledRewardConfig) -> Verifier:
    verifier = make_verifier(config)
    _limit_memory(config.memory_gib)
    return verifier


def _answer(config: PooledRewardConfig, verify: Verifier, message: bytes) -> Answer:
    def work() -> Reward | str:
        job: Job = pickle.loads(message)
        return final_answer_of(config, job) if isinstance(job, str) else verify(job)

    answer = _guarded(work, config)
    signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that a verifier forgot would go off in the next one's time
    return answer


def _guarded(work: Callable[[], T], config: PooledRewardConfig) -> T | Failed:
    ourselves = os.getpid()
    try:
        return work()
    except MemoryError as error:
        said = _text(error) or "no room"
        limit = f"reward.memory_gib is {config.memory_gib:g}"
        return Failed(reason=f"out of memory: {said} ({limit}; {_place(error)})", spent=True)
    # A user's function and the libraries it calls may raise anything, sys.exit() included; here it becomes a value.
    except BaseException as error:  # noqa: BLE001
        return Failed(reason=f"{type(error).__name__}: {_text(error)} ({_place(error)})")
    finally:
        if os.getpid() != ourselves:  # a copy that the work has forked, and that has come back to here
            os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return shortened(" ".join(str(error).split()))
    # Its __str__ is a user's too.
    except BaseException as another:  # noqa: BLE001
        return f"without a message ({type(another).__name__})"


def _place(error: BaseException) -> str:
    """The line that raised it. Reads no source, as `traceback` would: memory may be short."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else "no line"


def _limit_memory(gib: float) -> None:
    """Let allocations fail beyond so much address space, and a crash leave no image of it on the disk.

    Raises:
        MemoryError: the verifier's imports alone have taken more.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # elsewhere the system does not keep to it
        return
    limit = int(gib * _GIB)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if taken >= limit:
        raise MemoryError(f"imports take {taken / _GIB:.1f} GiB of address space")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; a grader in a loop would notice nothing.

    Elsewhere than on Linux an idle process still ends with its connection, a looping one does not.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(0)
