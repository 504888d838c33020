"""The Ray that a run uses, started for it or joined; and what goes wrong in Ray, told plainly."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_rl.config import RunConfig
from ray_rl.config.nodes import Node
from ray_rl.deadlines import DeadlineExceeded, call_within
from ray_rl.errors import ConfigError, RunError, first_error
from ray_rl.placement import Demand, cluster_address, is_own_ray, knock, named_address

T = TypeVar("T")

_OWN_PLACEMENT_SECONDS = 5.0
"""A Ray of the run's own gets no more nodes; this is for the one it has to announce itself."""
_JOIN_SECONDS = 30.0
_ROOM_FOR_ACTORS = 16
"""Rollout actors that a Ray of the run's own has CPUs for, however few the recipe asks for: `ray-rl scale` may want more. They
are numbers in a ledger, not processors, and no process is started for them."""


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A Ray of the run's own, or the cluster that `ray.address` names (inside a Ray job: the job's).

    Raises:
        ConfigError: there is no such cluster.
    """
    if is_own_ray(config):
        ray.init(
            address="local",
            num_cpus=own_cpus(config),
            include_dashboard=False,
            object_store_memory=config.ray.object_store_mib * 2**20,
            log_to_driver=config.ray.log_to_driver,
            logging_level=logging.ERROR,
            # Ray would start a process per CPU beforehand, and there are more of these than actors.
            _system_config={"prestart_worker_first_driver": False},
        )
    else:
        _join_cluster(config)
    try:
        yield
    finally:
        ray.shutdown()


def own_cpus(config: RunConfig) -> int:
    """CPUs that a Ray of the run's own offers to actors."""
    room = max(config.rollout.most_actors, _ROOM_FOR_ACTORS)
    return config.ray.num_cpus or math.ceil(Demand.of(config, rollout_actors=room).cpus)


def cluster_nodes() -> list[Node]:
    """Every living node of the Ray that this process has joined."""
    return [Node.of_ray(row) for row in ray.nodes() if row["Alive"]]


def placement_seconds(config: RunConfig) -> float:
    """How long to wait for resources that the cluster lacks."""
    return _OWN_PLACEMENT_SECONDS if is_own_ray(config) else config.ray.placement_timeout


def _join_cluster(config: RunConfig) -> None:
    named = named_address(config)
    try:
        knock(named)
        join(cluster_address(config), log_to_driver=config.ray.log_to_driver)
    except (OSError, ValueError, RuntimeError, RayError, DeadlineExceeded) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"ray.address: no Ray cluster could be joined at {named}: {reason}; start one, or unset RAY_ADDRESS and "
            "use ray.address=local"
        ) from error


def join(address: str, *, log_to_driver: bool = False, seconds: float = _JOIN_SECONDS) -> None:
    """Join a Ray that exists. From then on SIGTERM ends the process in order, as with a Ray that was begun in the main thread.

    Raises:
        DeadlineExceeded: it did not answer in time.
        OSError, ValueError, RuntimeError, ray.exceptions.RayError: what Ray says to an address that it cannot join.
    """
    call_within(
        lambda: ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.ERROR),
        seconds,
        what=f"the Ray at {address} to let this process join",
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


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
