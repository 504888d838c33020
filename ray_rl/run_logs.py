"""The files in a run's ``logs/``: one for the driver and one for each actor, appended to in every sitting, free of secrets.

    driver.log  rollout-0.log (its engine's process too)  learner-0.log  reward-0.log (its graders too)

An actor is told its file, and leaves its name in the environment, which the processes below it inherit. It writes where the
run's folder can be reached from its node, which takes shared storage where there are several nodes; what actors print lies among
Ray's own logs, wherever they are.
"""

from __future__ import annotations

import logging
import os
import socket
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


def log_file(folder: Path | None, component: str) -> Path | None:
    """The file of a component in a run's logs/. None: there is no such folder."""
    return None if folder is None else folder / f"{component}.log"


def log_environment(folder: Path | None, component: str) -> dict[str, str]:
    """The environment of a process that is to `keep_log` in `log_file`."""
    file = log_file(folder, component)
    return {} if file is None else {LOG_FILE: str(file)}


def begin_log(file: Path | None) -> None:
    """`keep_log` in a file, here and in the processes that this one starts; None: in none."""
    if file is not None:
        os.environ[LOG_FILE] = str(file)
    keep_log()


def keep_log(*apart: str) -> None:
    """Log into the file that the environment names, if it does and its folder can be reached from here.

    Args:
        apart: loggers that hand nothing on to the root logger and are to be kept too. To be called after their libraries'
            imports, which set them up.
    """
    path = Path(os.environ.get(LOG_FILE, ""))
    if not path.name or not path.parent.is_dir():
        return
    handler = _LogFile(path)
    for name in ("", *apart):
        logging.getLogger(name).addHandler(handler)
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
    # Python shows warnings by itself only as long as nobody handles them.
    added = [handler] if root.handlers or logging.lastResort is None else [handler, logging.lastResort]
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


def _hear_ours() -> None:
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
