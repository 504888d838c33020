"""What this machine has: processors, memory, GPUs, shared memory. Imports no torch: it would take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from ray_rl.weight_file import shared_memory_folder

_TOOL_SECONDS = 20.0
_WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"
_MIB = 2**20
_NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine, or the container that this process is in."""

    cpus: int
    memory: int
    """Bytes in total, swap included."""
    available: int
    """Bytes of memory that nobody uses."""
    shared_memory: int
    """Bytes that are free where weight files and Ray's objects lie."""
    gpus: tuple[int, ...] | None
    """Bytes of memory of each GPU that this process may see; None where there may be some and nothing tells."""

    @classmethod
    def look(cls) -> Machine:
        """This one, now."""
        memory = psutil.virtual_memory()
        limit, used = _container_memory()
        return cls(
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory=min(memory.total + psutil.swap_memory().total, limit),
            available=min(memory.available, limit - used),
            shared_memory=shutil.disk_usage(shared_memory_folder()).free,
            gpus=_gpus(),
        )


def _container_memory() -> tuple[int, int]:
    """Limit of this process's control group (2^63 without one), and what is used of it beyond what can be dropped."""
    for limit, used, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        folder = Path("/sys/fs/cgroup")
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            statistics = (folder / limit).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such version of control groups, or "max"
            continue
        droppable = next((int(line.split()[1]) for line in statistics if line.startswith(f"{dropped} ")), 0)
        return most, max(now - droppable, 0)
    return 2**63, 0


def _gpus() -> tuple[int, ...] | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in _NO_GPU:
        return ()
    tool = shutil.which("nvidia-smi") or shutil.which(_WSL_TOOL)
    if tool is None:
        # /dev/dxg: Windows's GPUs within WSL; /dev/kfd: AMD's.
        devices = [*Path("/dev").glob("nvidia[0-9]*"), *(Path("/dev") / name for name in ("dxg", "kfd"))]
        return None if any(device.exists() for device in devices) else ()
    query = [tool, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return visible_gpus(told, visible)


def visible_gpus(told: str, visible: str | None) -> tuple[int, ...] | None:
    """Bytes of memory of the GPUs that a process may see.

    Args:
        told: lines of nvidia-smi: index, UUID, memory in MiB.
        visible: CUDA_VISIBLE_DEVICES; None where it is unset.

    Returns:
        None when they are not what they should be, or do not fit together, as with parts of a GPU (MIG).
    """
    memory: dict[str, int] = {}
    for line in told.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not fields[2].isdigit():
            return None
        index, uuid, mebibytes = fields
        memory[index] = memory[uuid] = int(mebibytes) * _MIB
    if visible is None:
        return tuple(size for name, size in memory.items() if name.isdigit())
    named = [[size for name, size in memory.items() if name.startswith(one.strip())][:1] for one in visible.split(",")]
    return tuple(sizes[0] for sizes in named) if all(named) else None
