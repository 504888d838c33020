"""A run in an object store: a working copy on this machine, and what is brought into the store when.

The working copy has the files that grow (metrics, ledger, samples of groups, events); all that knows a run folder works in it.
They are sent as they are before each checkpoint's manifest and at the end, so that a checkpoint in the store is never newer than
its ledger. The checkpoints lie in the store only (`ray_rl.stored_checkpoints`).
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_rl.config.run import RunConfig
from ray_rl.control import CONTROL_FILE
from ray_rl.errors import ConfigError, NotWritten, RunError, writing
from ray_rl.lease import LEASE, Lease, Rhythm, holder
from ray_rl.object_store import PROOF, ObjectStore, Place
from ray_rl.ray_gauges import DISCOVERY_FILE
from ray_rl.run_state import RunFolder
from ray_rl.stored_checkpoints import StoredCheckpoints, stored_manifest

logger = logging.getLogger(__name__)

_CHECKPOINTS, _FINAL, _POLICY = "checkpoints", "final", "policy"
_IN_THE_STORE_ONLY = (_CHECKPOINTS, _FINAL, LEASE)
_HERE_ONLY = (_POLICY, CONTROL_FILE, DISCOVERY_FILE)


class StoredRun(RunFolder):
    """A `RunFolder` whose `path` is the working copy. Errors are also those of `ObjectStore`."""

    def __init__(self, store: ObjectStore, rhythm: Rhythm | None = None) -> None:
        """With an empty working copy; see `make`, `found` and `locked`, which fills it.

        Args:
            store: the run's folder.
            rhythm: of the lease.
        """
        with writing(Path(tempfile.gettempdir())):
            made = Path(tempfile.mkdtemp(prefix="ray-rl-run-"))
            super().__init__(made / store.name)  # whoever shows the run in a list takes that for its name
            self.path.mkdir()
        self.store = store
        self._lease = Lease(store, self.path, rhythm or Rhythm())
        self._checkpoints: StoredCheckpoints = StoredCheckpoints(
            store / _CHECKPOINTS, before_deletion=self._lease.check, before_manifest=self._before_manifest
        )
        self._removal = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        self._sent: dict[str, tuple[int, int]] = {}
        """Name -> size and time of what the store has of the working copy."""

    @classmethod
    def make(cls, store: ObjectStore, config: RunConfig, rhythm: Rhythm | None = None) -> StoredRun:
        """As `RunFolder.create`."""
        names = store.sizes()
        if any(not name.startswith(("logs/", PROOF)) for name in names):
            mend = f"go on with it: train --resume {store}; or name" if "config.yaml" in names else "name"
            raise ConfigError(f"--run-dir: {store} is not empty; {mend} a new folder")
        run = cls(store, rhythm)
        run.write_config(config)
        return run

    @classmethod
    def found(cls, store: ObjectStore, rhythm: Rhythm | None = None) -> StoredRun:
        """As `RunFolder.open`."""
        run = cls(store, rhythm)
        try:
            run._fetch("config.yaml")
        except FileNotFoundError as error:
            raise _no_run(store) from error
        return run

    @property
    def where(self) -> str:
        """As `RunFolder.where`."""
        return str(self.store)

    def write_config(self, config: RunConfig) -> None:
        """As `RunFolder.write_config`."""
        super().write_config(config)
        self._send("config.yaml")

    def finish(self, step: int) -> None:
        """As `RunFolder.finish`."""
        policy = self.store / _CHECKPOINTS / f"step_{step}" / _POLICY
        for name in policy.sizes():
            policy.copy(name, self.store / _FINAL)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process (`ray_rl.lease`), with what the store has in the working copy.

        At the end all of it is in the store, or the user is told where it lies.

        Raises:
            ConfigError: another process holds it.
        """
        with self._lease.held():
            for name in self.store.sizes():
                if name.partition("/")[0] not in _IN_THE_STORE_ONLY:
                    self._fetch(name)
            for line in self._checkpoints.sweep():
                logger.warning("%s", line)
            try:
                yield
            except BaseException:
                try:
                    self._mirror()
                except RunError as error:
                    logger.warning("%s", self._kept(error))
                raise
            try:
                self._mirror()
            except RunError as error:
                raise type(error)(self._kept(error)) from error

    def remove_unused(self) -> None:
        """As `RunFolder.remove_unused`."""
        is_used = (self.path / "metrics.jsonl").exists() or self.steps()
        super().remove_unused()
        if not is_used:
            self.store.delete_all()
            self._sent.clear()

    def _before_manifest(self) -> None:
        self._mirror()
        self._lease.check()

    def _mirror(self) -> None:
        """Bring what has changed in the working copy into the store, unless another process has the run now."""
        self._lease.check()
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not path.name.startswith(".") and name.partition("/")[0] not in _HERE_ONLY:
                try:
                    self._send(name)
                except NotWritten:
                    if path.exists():
                        raise  # else a tracker, whose files lie here too, has taken it away meanwhile

    def _send(self, name: str) -> None:
        with writing(self.path / name):
            found = (self.path / name).stat()
        state = found.st_size, found.st_mtime_ns
        if self._sent.get(name) != state:
            self.store.send(self.path / name, name)
            self._sent[name] = state

    def _fetch(self, name: str) -> None:
        self.store.fetch(name, self.path / name)
        found = (self.path / name).stat()
        self._sent[name] = found.st_size, found.st_mtime_ns

    def _kept(self, error: RunError) -> str:
        self._removal.detach()
        return f"{error}; what is not there lies in {self.path}"

    def _at_hand(self, place: Place) -> Path:
        """The files of a folder in the store, which `check` has found whole, in the working copy."""
        assert isinstance(place, ObjectStore)
        _, files = stored_manifest(place.parent)
        target = self.path / _POLICY
        for name, entry in (files or {}).items():
            if name.startswith(f"{place.name}/") and place.parent.fetch(name, self.path / name) != entry:
                raise RunError(f"{place.parent}/{name}: was replaced just now; try again")
        return target


def working_copy(store: ObjectStore) -> Path:
    """Where the driver of a run in progress keeps its files, if that is on this machine.

    Raises:
        ConfigError: it is not, or no run is going on there.
    """
    found = holder(store)
    if found is None and "config.yaml" not in store.sizes():
        raise _no_run(store)
    if found is None:
        raise ConfigError(f"{store}: no run is going on here; go on with this one: ray-rl train --resume {store}")
    if found.host != socket.gethostname() or not Path(found.folder).is_dir():
        raise ConfigError(f"{store}: {found} drives this run; ask there, of its working copy: {found.folder}")
    return Path(found.folder)


def _no_run(store: ObjectStore) -> ConfigError:
    return ConfigError(f"{store}: not a run folder (there is no config.yaml in it)")
