"""Errors that end a run with one clear line instead of a traceback."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot go on; the message says why and, where it can, the mend. Exit code 1."""


class ConfigError(RunError):
    """The user's mistake; the message has one line per fault, each with its path and the mend. Exit code 2."""


def first_error(error: BaseException) -> BaseException:
    """The first of the errors that a group of tasks ended with; any other error as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
