"""How values and errors stand in a message: on one line, and no longer than is of use."""

from __future__ import annotations

from reprlib import Repr

_LONGEST = 400

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long or deep."""
    return _repr.repr(value)


def printable(text: str) -> str:
    """A text on one line, whatever it holds, cut where it is long."""
    start = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(part if part.isprintable() else repr(part)[1:-1] for part in start)


def one_line(error: BaseException) -> str:
    """An error's message, or its type where it has none."""
    return printable(" ".join(str(error).split())) or type(error).__name__
