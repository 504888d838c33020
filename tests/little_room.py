"""A process in which the system refuses to let any file grow beyond a limit: a disk that is full, without filling one."""

import subprocess
import sys
import textwrap
from pathlib import Path

LIMIT = 4096
"""Bytes."""


def with_little_room(folder: Path, program: str) -> str:
    """What a program prints that runs in a folder and may use Path and NotWritten; it must end well."""
    start = (
        "import resource\nfrom pathlib import Path\nfrom ray_rl.errors import NotWritten\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))\n"
    )
    command = [sys.executable, "-B", "-c", start + textwrap.dedent(program)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
