"""A cluster on this machine as `ray start` makes it: each node with processes, ports, resources and a folder of its own.

The nodes know nothing of this checkout: they run elsewhere, without it on their import path. They ask for a token, since much of
Ray listens on every interface, whatever address a node is given.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HOST = "127.0.0.1"
_START_SECONDS = 90.0
_OBJECT_STORE_BYTES = 100 * 2**20
_QUICK_TO_MISS_A_NODE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


class RayNodes:
    """The head and whatever is added to it."""

    def __init__(self, folder: Path) -> None:
        """Nothing runs yet.

        Args:
            folder: for what the nodes print, and the token.
        """
        self._folder = folder
        # Sockets lie in the nodes' folders, and their paths may have no more than 107 characters.
        self._temporary = Path(tempfile.mkdtemp(prefix="rays-"))
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._port, self._dashboard = free_port(), free_port()
        token = folder / "token"
        token.write_text("a" * 32)
        self.environment: Mapping[str, str] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        """What a process needs to be let in."""

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{HOST}:{self._dashboard}"

    def start_head(self, cpus: int) -> None:
        """The node with the control service and the job server; returns when that answers."""
        self._start("head", "--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", cpus=cpus)
        self._wait_for("head", self._answers)

    def add(self, name: str, cpus: int) -> None:
        """One more node; does not wait until it has joined."""
        self._start(name, f"--address={HOST}:{self._port}", cpus=cpus)

    def kill(self, name: str) -> None:
        """Take a node away with all that runs on it, as a machine goes that loses its power."""
        node = self._nodes.pop(name)
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(30)

    def running_on(self, name: str) -> list[psutil.Process]:
        """All processes of a node."""
        return self.processes(self._nodes[name])

    @staticmethod
    def processes(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """A process and all below it."""
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(node.pid)
            return [*whole.children(recursive=True), whole]
        return []

    def end(self) -> None:
        """Leave nothing of it."""
        for name in list(self._nodes):
            self.kill(name)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self, name: str, *options: str, cpus: int) -> None:
        call = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options,
            f"--node-ip-address={HOST}", f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--temp-dir={self._temporary / name}",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        place = self._temporary / f"{name}-here"
        place.mkdir()
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        environment |= self.environment | _QUICK_TO_MISS_A_NODE
        # A job's command is `python`, whichever that is on the nodes.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        with (self._folder / f"{name}.log").open("wb") as log:
            self._nodes[name] = subprocess.Popen(
                call, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.address}/api/version", timeout=5).close()
        except urllib.error.HTTPError:
            return True  # it asks for the token
        except OSError:
            return False
        return True

    def _wait_for(self, name: str, happened) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not happened():
            log = (self._folder / f"{name}.log").read_text(errors="replace")
            assert self._nodes[name].poll() is None, f"the node {name} ended:\n{log}"
            assert time.monotonic() < deadline, f"the node {name} did not come:\n{log}"
            time.sleep(0.2)


@contextmanager
def ray_nodes(folder: Path) -> Iterator[RayNodes]:
    """A cluster that leaves no process, however the test ends."""
    nodes = RayNodes(folder)
    try:
        yield nodes
    finally:
        nodes.end()


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
