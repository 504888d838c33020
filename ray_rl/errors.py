"""Errors that end a run with one clear line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(Exception):
    """The run cannot go on; the message says why and, where it can, the mend. Exit code 1."""


class ConfigError(RunError):
    """The user's mistake; the message has one line per fault, each with its path and the mend. Exit code 2."""


class NotWritten(RunError):
    """A file of the run could not be written; the message says which, why and what to do. What was there before still is."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes files: what the system refuses becomes one line.

    Raises:
        NotWritten: the system refused, most often because the disk is full.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, RunError):  # a deadline's, which says what was late
            raise
        reason = error.strerror or str(error)
        raise NotWritten(
            f"{path}: could not be written: {reason}; make room there, or check its permissions"
        ) from error


def first_error(error: BaseException) -> BaseException:
    """The first of the errors that a group of tasks ended with; any other error as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
