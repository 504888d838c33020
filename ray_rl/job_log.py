"""What a job prints, as it arrives: for the terminal, and a report that stands in it."""

from __future__ import annotations

from collections.abc import Callable

_MARK = "|ray-rl report| "
"""Before each line of a report, so that whatever else prints between them does no harm."""


def report_lines(text: str) -> str:
    """A report of several lines, for a job to print."""
    return "".join(f"{_MARK}{line}\n" for line in text.splitlines())


class JobLog:
    """Takes the log of a job in pieces; whole lines are shown, those of a report are kept instead."""

    def __init__(self, show: Callable[[str], None]) -> None:
        """`show` is given one line at a time, without its end."""
        self._show = show
        self._line = ""
        """Begun, and not at its end yet."""
        self._seen = 0
        """Characters that were taken."""
        self._known = 0
        """Characters that come again, after the log was begun anew."""
        self._report: list[str] = []

    @property
    def report(self) -> str:
        """The last one that was printed; empty when there was none."""
        return "\n".join(self._report)

    def begin_anew(self) -> None:
        """The next piece is the log's first: a connection was lost, and the server knows nothing of the last one."""
        self._known = self._seen

    def take(self, piece: str) -> int:
        """The next piece; how many of its characters have not come before."""
        known = min(self._known, len(piece))
        self._known -= known
        self._seen += len(piece) - known
        *lines, self._line = (self._line + piece[known:]).split("\n")
        for line in lines:
            self._take_line(line)
        return len(piece) - known

    def end(self) -> None:
        """Nothing more will come."""
        if self._line:
            self._take_line(self._line)
        self._line = ""

    def _take_line(self, line: str) -> None:
        if not line.startswith(_MARK):
            self._show(line)
            return
        line = line.removeprefix(_MARK)
        if line == "{":  # a later one replaces it
            self._report = []
        self._report.append(line)
