"""One user at a time of a run in an object store, where no lock of an operating system reaches.

`lease.json` in the run's folder says who uses it, and whoever does writes it anew every few seconds. Who finds one watches it:
if it changes, the run is in use; if it stays as it is for `Rhythm.silence`, its writer is gone. No clocks are compared.

A store cannot in general refuse to replace an object that another has just made. So whoever wrote a lease reads it again after
`Rhythm.settle`, before each beat and before each checkpoint's manifest. Two that begin at the same moment are told apart by
that, unless the store takes longer than `settle` for a few bytes: then one of them notices at its next beat, and writes no
manifest. The same befalls one that slept, or could not reach the store, while another took the run over.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ray_rl import deadlines
from ray_rl.errors import ConfigError, NotWritten, RunError
from ray_rl.object_store import ObjectStore, StoreUnreadable

logger = logging.getLogger(__name__)

LEASE = "lease.json"


class LeaseLost(RunError):
    """Another process has taken the run over; nothing more is written into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Seconds."""

    beat: float = 15.0
    """Between two writings of the holder."""
    silence: float = 75.0
    """Without one after which the holder is given up. Several beats, for a store may be slow."""
    settle: float = 2.0
    """Between writing a lease and reading it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a lease says."""

    token: str
    """Of this holder and no other."""
    host: str
    pid: int
    since: str
    """By the holder's clock, for the user."""
    folder: str
    """Where the holder keeps its working copy."""
    beats: int = 0
    """How often it has shown that it lives."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """Of one process on one run."""

    def __init__(self, store: ObjectStore, folder: Path, rhythm: Rhythm) -> None:
        """Nothing happens before `held`.

        Args:
            store: the run's folder.
            folder: this process's working copy.
            rhythm: the same for all who use the run.
        """
        self._store = store
        self._rhythm = rhythm
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._own = Holder(
            token=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), since=since, folder=str(folder)
        )
        self._done = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run, and show it, in the block.

        Raises:
            ConfigError: another process holds it.
            NotWritten: the store refuses.
            StoreUnreadable: it does not answer.
        """
        if (other := holder(self._store)) is not None:
            self._outwait(other)
        self._write()
        time.sleep(self._rhythm.settle)
        self._check(
            lambda other: ConfigError(f"{self._store}: {other} began to use this run just now; end one of them")
        )
        beating = threading.Thread(target=self._beat, name=f"lease of {self._store}", daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._done.set()
            self._release(beating)

    def check(self) -> None:
        """See that nobody has taken the run over.

        Raises:
            LeaseLost: somebody has.
            StoreUnreadable: the store does not say.
        """
        self._check(lambda other: LeaseLost(f"{self._store}: {other} has taken this run over; end one of the two"))

    def _check(self, error: Callable[[Holder], RunError]) -> None:
        other = holder(self._store)
        if other is not None and other.token != self._own.token:
            raise error(other)

    def _outwait(self, other: Holder) -> None:
        """Return when the holder is gone."""
        silence = self._rhythm.silence
        logger.warning("%s: %s holds this run; it has %g s to show that it lives", self._store, other, silence)
        deadline = deadlines.Deadline(silence, what="the holder to show that it lives")
        while deadline.left:
            time.sleep(min(self._rhythm.beat / 4, deadline.left))
            found = holder(self._store)
            if found is None:
                return
            if found != other:
                raise ConfigError(f"{self._store}: {found} is using this run; wait for it or end it")

    def _beat(self) -> None:
        while not self._done.wait(self._rhythm.beat):
            try:
                self.check()
                self._own = replace(self._own, beats=self._own.beats + 1)
                self._write()
            except LeaseLost as error:
                logger.warning("%s", error)  # the next checkpoint ends the run
                return
            except (NotWritten, StoreUnreadable) as error:
                logger.warning("%s", error)

    def _write(self) -> None:
        self._store.write(LEASE, json.dumps(asdict(self._own)).encode())

    def _release(self, beating: threading.Thread) -> None:
        """Let the next one in at once; who cannot say so is outwaited."""
        patience = self._store.patience
        try:
            deadlines.join(beating, 2 * patience.seconds * patience.attempts, what="the last beat of a lease")
            self.check()
            self._store.delete(LEASE)
        except RunError as error:
            logger.warning("%s", error)


def holder(store: ObjectStore) -> Holder | None:
    """Who uses the run in a folder, or did so when it died.

    Raises:
        StoreUnreadable: the store does not say.
        ConfigError: another version's lease.
    """
    try:
        return TypeAdapter(Holder).validate_json(store.read(LEASE))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{store}/{LEASE}: another version wrote it; delete it when nobody uses the run") from error
