"""`ray-rl status` and `ray-rl scale`: what another process asks of a run in progress, through its mailbox (`ray_rl.control`).

A run that is gone is known by its process, or by a port where nobody listens, before Ray is imported.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ray_rl import deadlines
from ray_rl.control import CONTROL_FILE, Contact
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import ConfigError, RunError
from ray_rl.mailbox import ANSWER_SECONDS, Answer, RunStatus
from ray_rl.placement import knock
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_KNOCK_SECONDS = 2.0
_JOIN_SECONDS = 20.0


class NotRunning(ConfigError):
    """No run is going on in that folder, or none that can be reached."""


def ask_status(folder: Path) -> RunStatus:
    """What the run in a folder is doing.

    Raises:
        NotRunning: none is going on there.
        RunError: it does not answer.
    """
    with _mailbox_of(folder) as mailbox:
        return _answer(folder, mailbox.ask.remote())


def order_scale(folder: Path, size: int) -> str:
    """Have the run in a folder use another number of rollout actors.

    Returns:
        One line: what happens now.

    Raises:
        ConfigError: the driver refuses, or no run is going on there (NotRunning).
        RunError: it does not answer.
    """
    if size < 1:
        raise ConfigError(f"N: {size} rollout actors; use at least 1, or end the run with Ctrl-C, which saves it")
    with _mailbox_of(folder) as mailbox:
        answer: Answer = _answer(folder, mailbox.scale.remote(size))
    if not answer.accepted:
        raise ConfigError(answer.text)
    return answer.text


@contextmanager
def _mailbox_of(folder: Path) -> Iterator[ActorHandle]:
    contact = _read_contact(folder)
    _check(contact, folder)
    os.environ.update(contact.environment)  # Ray reads them when it is imported
    import ray

    from ray_rl.ray_session import call_within, join

    try:
        join(contact.address, seconds=_JOIN_SECONDS)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError, DeadlineExceeded) as error:
        _check(contact, folder)  # it may have ended meanwhile
        raise RunError(
            f"{folder}: this process cannot join the run's Ray at {contact.address}: {one_line(error)}; try again, on a "
            "machine of its cluster and as the user who started the run"
        ) from error
    try:
        yield call_within(lambda: _find(contact, folder), ANSWER_SECONDS, what="the run's Ray to name its mailbox")
    finally:
        ray.shutdown()


def _find(contact: Contact, folder: Path) -> ActorHandle:
    import ray

    try:
        return ray.get_actor(contact.name, namespace=contact.namespace)
    except ValueError as error:  # a mailbox ends with its driver
        raise _gone(folder, "its Ray does not know it any more") from error


def _answer(folder: Path, ref: Any) -> Any:
    import ray

    try:
        return deadlines.get(ref, 2 * ANSWER_SECONDS, what="the run's mailbox to answer")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise NotRunning(f"{folder}: the run's mailbox died just now: {one_line(error)}; try again") from error


def _read_contact(folder: Path) -> Contact:
    from ray_rl.run_state import RunFolder

    path = RunFolder.open(folder).path / CONTROL_FILE
    try:
        return Contact(**json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise NotRunning(
            f"{folder}: no run is going on here, or it is only just starting; go on with this one: ray-rl train --resume "
            f"{folder}"
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise NotRunning(
            f"{path}: cannot be read: {one_line(error)}; another version wrote it, or it is damaged"
        ) from error


def _check(contact: Contact, folder: Path) -> None:
    """Raise NotRunning when the driver is gone: at once where its process or its Ray's port can be asked for."""
    try:
        if contact.host == socket.gethostname() and not _is_alive(contact):
            raise ProcessLookupError(f"process {contact.pid} is no more")
        knock(contact.address, _KNOCK_SECONDS)
    except OSError as error:
        raise _gone(folder, one_line(error)) from error


def _is_alive(contact: Contact) -> bool:
    """Whether the driver's process runs; a later one that got its number began at another time."""
    try:
        driver = psutil.Process(contact.pid)
        return driver.status() != psutil.STATUS_ZOMBIE and abs(driver.create_time() - contact.started) < 2
    except psutil.NoSuchProcess:
        return False


def _gone(folder: Path, reason: str) -> NotRunning:
    return NotRunning(
        f"{folder}: the run that was going on here is gone ({reason}); go on with it: ray-rl train --resume {folder}"
    )
