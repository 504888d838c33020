"""The Ray that a run uses, started for it or joined; and what goes wrong in Ray, told plainly."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from ray_rl.config import RunConfig
from ray_rl.errors import ConfigError, RunError, first_error
from ray_rl.placement import required_resources

T = TypeVar("T")

_KNOCK_SECONDS = 10.0
_OWN_PLACEMENT_SECONDS = 5.0
"""A Ray of the run's own gets no more nodes; this is for the one it has to announce itself."""


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A Ray of the run's own, or the cluster that `ray.address` names (inside a Ray job: the job's).

    Raises:
        ConfigError: there is no such cluster.
    """
    if _is_own_ray(config):
        cpus = config.ray.num_cpus or math.ceil(required_resources(config).get("CPU", 1))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=config.ray.object_store_mib * 2**20,
            log_to_driver=config.ray.log_to_driver,
            logging_level=logging.ERROR,
        )
    else:
        _join_ray(config)
    try:
        yield
    finally:
        ray.shutdown()


def _is_own_ray(config: RunConfig) -> bool:
    """Whether the run starts a Ray instead of joining one."""
    return config.ray.address == "local" and not any(os.environ.get(name) for name in ("RAY_JOB_ID", "RAY_ADDRESS"))


def _join_ray(config: RunConfig) -> None:
    address = "auto" if config.ray.address == "local" else config.ray.address
    named = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    try:
        _knock(named)
        ray.init(address=address, log_to_driver=config.ray.log_to_driver, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"ray.address: no Ray cluster could be joined at {named}: {reason}; start one, or unset RAY_ADDRESS and "
            "use ray.address=local"
        ) from error


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at host:port, for which Ray itself would wait many minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def placement_seconds(config: RunConfig) -> float:
    """How long to wait for resources that the cluster lacks."""
    return _OWN_PLACEMENT_SECONDS if _is_own_ray(config) else config.ray.placement_timeout


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; what actors and groups of tasks raise comes out as the error that it was.

    Raises:
        RunError: told in one line, also when it comes from an actor or an actor's process died.
        KeyboardInterrupt: the user would not wait for the step in progress.
    """
    try:
        return asyncio.run(work)
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    except (ExceptionGroup, RayTaskError, RayActorError) as error:
        first = first_error(error)
        if isinstance(first, RayTaskError) and isinstance(first.cause, RunError):
            raise first.cause from error
        if isinstance(first, RayActorError):
            raise RunError(f"an actor's process died: {' '.join(str(first).split())}") from error
        if first is error:
            raise
        raise first from error
