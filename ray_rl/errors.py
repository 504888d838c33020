"""Errors that end a run with one clear line instead of a traceback."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot go on; the message says why and, where it can, the mend. Exit code 1."""


class ConfigError(RunError):
    """The user's mistake; the message has one line per fault, each with its path and the mend. Exit code 2."""
