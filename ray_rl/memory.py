"""Peak resident memory of the run's processes on this machine."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class MemoryWatch:
    """Samples the memory of this process and all its descendants while it is entered.

    Shared pages count once over all processes that map them (PSS, proportional set size), where the system tells.
    """

    def __init__(self, interval: float = 5.0) -> None:
        """Sample every `interval` seconds."""
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> MemoryWatch:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=self._interval)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """Bytes that this process and its descendants hold now."""
    own = psutil.Process()
    return sum(_bytes_of(process) for process in (own, *own.children(recursive=True)))


def _bytes_of(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return getattr(info, "pss", info.rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
