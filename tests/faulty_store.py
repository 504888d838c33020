"""An object store that lives in this process and, on demand, fails at its Nth operation: a real file system of fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from ray_rl.object_store import ObjectStore, Patience

SCHEME = "faulty"
AT_ONCE = Patience(seconds=20, attempts=1, pause=0)
TWICE = Patience(seconds=20, attempts=2, pause=0)


class Killed(BaseException):
    """The process dies here: no handler of errors sees anything else of it."""


class FaultyFileSystem(MemoryFileSystem):
    """Counts what changes something; `Plan` says which of these operations fail."""

    protocol = SCHEME
    store: dict[str, Any] = {}  # noqa: RUF012 - one store, as that of the class it extends
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix(f"{SCHEME}:/"))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            Plan.now.count(f"write {path}")
        return super()._open(path, mode, **kwargs)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """One operation for each object, as a store does it."""
        for name in sorted(self.find(path)):
            Plan.now.count(f"delete {name}")
            super().rm_file(name)
        if recursive and self.exists(path):
            super().rm(path, recursive=True)

    def rm_file(self, path: str) -> None:
        Plan.now.count(f"delete {path}")
        super().rm_file(path)


class Plan:
    """Which operations fail, and how; what has been done so far."""

    now: Plan

    def __init__(self, first: int | None = None, last: int | None = None, error: type[BaseException] = OSError) -> None:
        """Operations `first` to `last`, from 0, raise the error; without `first` none does, without `last` all later ones."""
        self.first, self.last, self.error = first, last, error
        self.done: list[str] = []
        self.begun = 0

    def count(self, what: str) -> None:
        number, self.begun = self.begun, self.begun + 1
        if self.first is not None and self.first <= number and (self.last is None or number <= self.last):
            raise self.error(f"no {what} today")
        self.done.append(what)


Plan.now = Plan()
fsspec.register_implementation(SCHEME, FaultyFileSystem, clobber=True)


@contextmanager
def failing(first: int | None = None, last: int | None = None, error: type[BaseException] = OSError) -> Iterator[Plan]:
    """A plan for what happens in the block."""
    Plan.now = plan = Plan(first, last, error)
    try:
        yield plan
    finally:
        Plan.now = Plan()


def empty_store(patience: Patience = AT_ONCE) -> ObjectStore:
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    return ObjectStore.of(f"{SCHEME}://bucket/run", patience)
