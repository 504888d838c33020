"""The mailbox of a run in progress, through which `ray-rl status` and `ray-rl scale` reach it from another terminal.

    driver  --exchange, twice a second-->  Mailbox, a named actor  <--ask, scale--  a process that joins the run's Ray

``control.json`` in the run's folder says where that is. It appears when the mailbox answers and vanishes with the run; what a
killed driver leaves of it is recognised. Whatever becomes of the mailbox, the run goes on. The other end of it is
`ray_rl.control_client`. Ray is imported where it is needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import psutil
from pydantic import Field

from ray_rl import deadlines
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import ConfigError, RunError
from ray_rl.mailbox import Answer, Mailbox, Order, RunStatus
from ray_rl.placement import no_place
from ray_rl.protocols import RolloutPool
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

NAMESPACE = "ray-rl"
CONTROL_FILE = "control.json"
_POLL_SECONDS = 0.5
_START_SECONDS = 180.0
"""In which a mailbox must answer for the first time: all engines may be loading at that moment."""
_EXCHANGE_SECONDS = 30.0
_ATTEMPTS = 5
"""Mailboxes lost in a row after which the run goes on without."""
_SLOTS = 64
"""Calls that a mailbox takes at once; those who wait for an answer occupy one each."""
INHERITED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
"""What a process must have in common with the driver in order to be let in. The token itself lies where Ray finds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What control.json holds. The annotations say what its reader believes."""

    address: Annotated[str, Field(pattern=r"^[^/\s]+:[0-9]{1,5}$")]
    """host:port of the control service of the run's Ray."""
    namespace: str
    name: str
    """Of the mailbox, in that namespace."""
    environment: Mapping[str, str]
    """What a process must have in common with the driver in order to join."""
    host: str
    """The driver's."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    """The driver's."""
    pid_namespace: str | None
    """In which that number is the driver's, by `pid_namespace`."""
    started: float
    """When the driver's process began, in seconds since the epoch; another one may get its number."""


def pid_namespace() -> str | None:
    """Tells by whose count this process has its number, for containers have their own; None where the system has no such."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class ControlServer:
    """The driver's end, entered around a run in an event loop. It never ends the run: what goes wrong here is a warning."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        status: Callable[[], RunStatus],
        scale: Callable[[int], str],
        warn: Callable[[str], None],
    ) -> None:
        """Of one sitting of a run.

        Args:
            folder: of the run.
            run_id: of the sitting; names the mailbox.
            status: asked twice a second.
            scale: takes the number of rollout actors that somebody wants and says in a line what happens now, or raises
                ConfigError. What else it raises is answered too.
            warn: told when the run cannot be reached any more.
        """
        self._file = folder / CONTROL_FILE
        self._run_id = run_id
        self._status = status
        self._scale = scale
        self._warn = warn
        self._made = 0
        self._mailbox: ActorHandle | None = None
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> ControlServer:
        """Begin; does not wait for the mailbox."""
        self._remove_file()  # of a sitting that was killed
        self._task = asyncio.create_task(self._serve(), name="control")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Be reachable no longer."""
        with suppress(DeadlineExceeded):
            await deadlines.end(self._task, _EXCHANGE_SECONDS, what="the task that serves the run's mailbox")
        self._discard_mailbox()

    async def _serve(self) -> None:
        from ray.exceptions import RayError

        answers: dict[int, Answer] = {}
        lost = 0
        while True:
            try:
                orders = await self._exchange(answers)
            except (RayError, DeadlineExceeded, ValueError) as error:  # ValueError: Ray makes no such actor just now
                lost += 1
                logger.warning("the run's mailbox is gone and made anew: %s", one_line(error))
                self._discard_mailbox()
                if lost == _ATTEMPTS:
                    raise
                orders = []
            else:
                lost = 0
            answers = {order.number: self._obey(order) for order in orders}
            if not answers:
                await asyncio.sleep(_POLL_SECONDS)

    async def _exchange(self, answers: Mapping[int, Answer]) -> list[Order]:
        fresh = self._mailbox is None
        mailbox = self._mailbox = self._mailbox or self._make_mailbox()
        seconds = _START_SECONDS if fresh else _EXCHANGE_SECONDS
        orders = await deadlines.wait(
            mailbox.exchange.remote(self._status(), answers), seconds, what="the run's mailbox to answer its driver"
        )
        if fresh:
            _write_atomically(self._file, json.dumps(asdict(self._contact()), indent=2) + "\n")
        return orders

    def _obey(self, order: Order) -> Answer:
        from ray.exceptions import RayError

        try:
            return Answer(accepted=True, text=self._scale(order.size))
        except ConfigError as error:
            return Answer(accepted=False, text=str(error))
        except (RunError, RayError, RuntimeError, OSError) as error:
            text = f"the run could not carry out the order: {one_line(error)}; see ray-rl status, and try again"
            return Answer(accepted=False, text=text)

    def _make_mailbox(self) -> ActorHandle:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._made += 1
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(Mailbox)
            .options(name=self._name, namespace=NAMESPACE, num_cpus=0, max_concurrency=_SLOTS, scheduling_strategy=here)
            .remote()
        )

    @property
    def _name(self) -> str:
        """Ray may hold on to the name of a dead actor for a while, hence the number."""
        return f"run-{self._run_id}" if self._made == 1 else f"run-{self._run_id}-{self._made}"

    def _contact(self) -> Contact:
        import ray

        process = psutil.Process()
        return Contact(
            address=ray.get_runtime_context().gcs_address,
            namespace=NAMESPACE,
            name=self._name,
            environment={name: os.environ[name] for name in INHERITED if name in os.environ},
            host=socket.gethostname(),
            pid=process.pid,
            pid_namespace=pid_namespace(),
            started=process.create_time(),
        )

    def _discard_mailbox(self) -> None:
        import ray

        self._remove_file()
        mailbox, self._mailbox = self._mailbox, None
        if mailbox is not None:
            with suppress(ray.exceptions.RayError, ValueError):  # it may be gone already, and Ray with it
                ray.kill(mailbox)

    def _remove_file(self) -> None:
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._warn(f"`ray-rl status` and `ray-rl scale` cannot reach this run any more: {one_line(error)}")


def scale_pool(pool: RolloutPool, size: int, without_place: Callable[[int], int]) -> str:
    """Carry out an order.

    Args:
        pool: of the run.
        size: rollout actors that are wanted.
        without_place: says for how many of so many actors the cluster has no place at present.

    Returns:
        One line: what happens now.

    Raises:
        ConfigError: nobody can want so few.
        RayError, RuntimeError, OSError: the cluster did not say; the pool is as it was.
    """
    if size < 1:
        raise ConfigError(f"N: {size} rollout actors; use at least 1")
    before = pool.size
    if size == before:
        return f"{size} rollout actors, as before"
    waiting = without_place(size) if size > before else 0  # may raise, so while nothing has changed
    pool.resize(size)
    more, fewer = size - before, before - size
    if more > 0:
        happens = "1 is starting" if more == 1 else f"{more} are starting"
    else:
        happens = "1 ends when its groups are done" if fewer == 1 else f"{fewer} end when their groups are done"
    line = f"from {before} to {size} rollout actors; {happens}"
    return f"{line}; {no_place(waiting, size)}" if waiting else line


def _write_atomically(path: Path, text: str) -> None:
    """All of it or nothing, for whoever reads at that moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
