"""The files in a run's ``logs/``: one for the driver and one for each actor, appended to in every sitting, free of secrets.

    driver.log  rollout-0.log (its engine's process too)  learner-0.log  reward-0.log (its graders too)

An actor writes where the run's folder can be reached from its node, which takes shared storage where there are several nodes.
What actors print lies among Ray's own logs, wherever they are.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_rl.errors import writing
from ray_rl.redaction import RedactingFormatter

LOG_FILE = "RAY_RL_LOG_FILE"
"""Environment variable: the log of this process and of those that it starts."""
_OURS = ("ray_rl", "actors", "learner")
"""Of these loggers everything from INFO on is kept; of others what they let through by themselves, usually warnings."""
_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"


def component_log(folder: Path | None, component: str) -> Path | None:
    """Where a component logs, by the run's logs/; None where a run has no folder."""
    return None if folder is None else folder / f"{component}.log"


def keep_log(path: Path | None, *apart: str) -> None:
    """Log into a file, if its folder can be reached from here, and let the processes that this one starts do so too.

    Args:
        path: of the file; None: nothing is kept.
        apart: as `inherit_log`.
    """
    if path is not None:
        os.environ[LOG_FILE] = str(path)
        inherit_log(*apart)


def inherit_log(*apart: str, shown: bool = True) -> None:
    """Log into the file of the process that started this one, if it has one.

    Args:
        apart: loggers that hand nothing on to the root logger and are to be kept too. To be called after their libraries'
            imports, which set them up.
        shown: whether warnings go to standard error as well, as they do in a process that keeps no log.
    """
    path = Path(os.environ.get(LOG_FILE, ""))
    if not path.name or not path.parent.is_dir():
        return
    handler = _LogFile(path)
    for name in apart:
        logging.getLogger(name).addHandler(handler)
    for one in _with_screen(handler) if shown else [handler]:
        logging.getLogger().addHandler(one)
    _hear_ours()


@contextmanager
def driver_log(folder: Path) -> Iterator[Callable[[str], None]]:
    """Log this process into ``driver.log`` while this is entered. Warnings are still shown, too.

    Args:
        folder: the run's logs/, made where it is missing.

    Yields:
        Writes a line that the user was told otherwise, into the file alone.

    Raises:
        NotWritten: the system refused.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(folder / "driver.log")
    told = logging.Logger("run")  # stands below no other logger, so that nobody shows its lines once more
    told.addHandler(handler)
    root = logging.getLogger()
    added = _with_screen(handler)
    for one in added:
        root.addHandler(one)
    _hear_ours()
    told.info("process %d on %s begins", os.getpid(), socket.gethostname())
    try:
        yield told.info
    finally:
        for one in added:
            root.removeHandler(one)


class _LogFile(logging.Handler):
    """A file to which several processes append whole lines. What cannot be written is lost, and nothing else is.

    It is opened for each line: whoever configures logging closes the handlers that there are, as vLLM does when it is imported.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.setFormatter(RedactingFormatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        try:
            line = self.format(record)
        except (TypeError, ValueError):  # of its arguments; logging shows where it was made
            self.handleError(record)
            return
        with suppress(OSError), self._path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode(errors="backslashreplace"))


class _Screen(logging.Handler):
    """Warnings on standard error, as Python shows them by itself as long as nobody handles them, but without secrets."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(RedactingFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record where standard error leads at the moment: a live bar redirects it."""
        try:
            print(self.format(record), file=sys.stderr)
        except (TypeError, ValueError, OSError):
            self.handleError(record)


def _with_screen(handler: logging.Handler) -> list[logging.Handler]:
    """For the root logger."""
    return [handler] if logging.getLogger().handlers else [handler, _Screen()]


def _hear_ours() -> None:
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
