"""`ray-rl status` and `ray-rl scale`: what another process asks of a run in progress, through its mailbox (`ray_rl.control`).

A run that is gone is known by its process, or by a port where nobody listens, before Ray is imported.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import TypeAdapter, ValidationError

from ray_rl import deadlines
from ray_rl.control import CONTROL_FILE, INHERITED, Contact, pid_namespace
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import ConfigError, RunError
from ray_rl.mailbox import ANSWER_SECONDS, PERHAPS_OBEYED, Answer, RunStatus
from ray_rl.placement import knock
from ray_rl.wording import one_line, printable

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
        answer: Answer = _answer(folder, mailbox.scale.remote(size), otherwise=PERHAPS_OBEYED)
    if not answer.accepted:
        raise ConfigError(answer.text)
    return answer.text


@contextmanager
def _mailbox_of(folder: Path) -> Iterator[ActorHandle]:
    contact = _read_contact(folder)
    _check(contact, folder)
    share_environment(contact)
    import ray

    from ray_rl.ray_session import join

    try:
        join(contact.address, seconds=_JOIN_SECONDS)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError, DeadlineExceeded) as error:
        _check(contact, folder)  # it may have ended meanwhile
        raise RunError(
            f"{folder}: this process cannot join the run's Ray at {contact.address}: {one_line(error)}; try again, on a "
            "machine of its cluster and as the user who started the run"
        ) from error
    try:
        yield deadlines.call_within(
            lambda: _find(contact, folder), ANSWER_SECONDS, what="the run's Ray to name its mailbox"
        )
    finally:
        ray.shutdown()


def share_environment(contact: Contact) -> None:
    """Take over what lets this process in, before Ray is imported and reads it; a file may name other variables in vain."""
    os.environ.update({name: contact.environment[name] for name in INHERITED if name in contact.environment})


def _find(contact: Contact, folder: Path) -> ActorHandle:
    import ray

    try:
        return ray.get_actor(contact.name, namespace=contact.namespace)
    except ValueError as error:  # a mailbox ends with its driver
        raise _gone(folder, "its Ray does not know it any more") from error


def _answer(folder: Path, ref: Any, *, otherwise: str = "try again") -> Any:
    """What a call of the mailbox returns; `otherwise` says what then, when nothing comes."""
    import ray

    try:
        return deadlines.get(ref, 2 * ANSWER_SECONDS, what="the run's mailbox to answer")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from error
        raise
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"{error}; {otherwise}") from error
    except ray.exceptions.RayError as error:
        raise NotRunning(f"{folder}: the run's mailbox died just now: {one_line(error)}; {otherwise}") from error


def _read_contact(folder: Path) -> Contact:
    from ray_rl.run_state import RunFolder

    path = RunFolder.open(folder).path / CONTROL_FILE
    try:
        with path.open("rb") as file:
            owner, text = os.fstat(file.fileno()).st_uid, file.read()
    except FileNotFoundError as error:
        raise NotRunning(
            f"{folder}: no run is going on here, or it is only just starting; go on with this one: ray-rl train --resume "
            f"{folder}"
        ) from error
    except OSError as error:
        raise _unreadable(path, one_line(error)) from error
    if owner not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path}: belongs to another user ({owner}), who could lead this process anywhere; ask as the user who started "
            "the run"
        )
    try:
        return TypeAdapter(Contact).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _unreadable(path, printable(f"{where}: {first['msg']}" if where else first["msg"])) from error


def _unreadable(path: Path, reason: str) -> NotRunning:
    return NotRunning(f"{path}: cannot be read: {reason}; another version wrote it, or it is damaged")


def _check(contact: Contact, folder: Path) -> None:
    """Raise NotRunning when the driver is gone: at once where its process or its Ray's port can be asked for."""
    try:
        if _numbers_like_us(contact) and not _is_alive(contact):
            raise ProcessLookupError(f"process {contact.pid} is no more")
        knock(contact.address, _KNOCK_SECONDS)
    except OSError as error:
        raise _gone(folder, one_line(error)) from error


def _numbers_like_us(contact: Contact) -> bool:
    """Whether the driver's number means the same process here: containers on one machine number theirs separately."""
    return contact.host == socket.gethostname() and contact.pid_namespace == pid_namespace()


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
