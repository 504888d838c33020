"""Checkpoints and exports in an object store: each rank writes its files on its own node and brings them there itself.

What makes a checkpoint of them, its manifest, is the driver's (`ray_rl.stored_checkpoints`). Collectives, as in
`learner.checkpoint`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from learner.checkpoint import (
    CheckpointError,
    CheckpointNotWritten,
    by_all,
    export_model,
    load_checkpoint,
    own_files,
    save_checkpoint,
)
from ray_rl.errors import NotWritten
from ray_rl.inventory import MANIFEST, FileEntry, parse_manifest, take
from ray_rl.object_store import ObjectStore, StoreUnreadable

if TYPE_CHECKING:
    from learner.engine import LearnerEngine


def store_checkpoint(engine: LearnerEngine, store: ObjectStore) -> dict[str, FileEntry]:
    """As `save_checkpoint`, into a folder of a store that has none yet.

    Returns:
        What this rank put there.

    Raises:
        CheckpointNotWritten: there is no room here meanwhile, or the store refuses.
    """
    with _scratch() as folder:
        save_checkpoint(engine, folder, shared=False)
        return _put(engine, folder, store)


def store_model(engine: LearnerEngine, model_path: str | os.PathLike[str], store: ObjectStore) -> dict[str, FileEntry]:
    """As `export_model`, into a folder of a store. Returns and raises as `store_checkpoint`."""
    with _scratch() as folder:
        export_model(engine, model_path, folder)
        return _put(engine, folder, store)


def load_stored_checkpoint(engine: LearnerEngine, store: ObjectStore) -> None:
    """The inverse of `store_checkpoint`, once the manifest in the folder above it lists what was put there.

    Raises:
        CheckpointError: as `load_checkpoint`; or the store does not give it.
    """
    with _scratch() as folder:
        by_all(
            engine,
            lambda: _get(engine, store, folder),
            (StoreUnreadable, ValueError, OSError),
            lambda reason: CheckpointError(f"{store}: {reason}"),
        )
        load_checkpoint(engine, folder)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A place for a folder of this rank's; it is not made yet, for what fails must fail on all ranks."""
    parent = Path(tempfile.gettempdir()) / f"ray-rl-{uuid.uuid4().hex}"
    try:
        yield parent / "checkpoint"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _put(engine: LearnerEngine, folder: Path, store: ObjectStore) -> dict[str, FileEntry]:
    def put() -> dict[str, FileEntry]:
        entries = take(folder)
        for name in entries:
            store.send(folder / name, name)
        return entries

    return by_all(engine, put, (NotWritten, OSError), CheckpointNotWritten)


def _get(engine: LearnerEngine, store: ObjectStore, folder: Path) -> None:
    """Bring here what this rank reads, and of the rest the names, by which DeepSpeed knows whose checkpoint it is.

    Raises:
        ValueError: something is not what was written.
    """
    _, files = parse_manifest(store.parent.read(MANIFEST))
    own = {Path(path).relative_to(folder).as_posix() for path in own_files(engine, folder)}
    for path, entry in (files or {}).items():
        name = path.removeprefix(f"{store.name}/")
        if name == path:
            continue
        if name not in own:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        elif store.fetch(name, folder / name) != entry:
            raise ValueError(f"{name} is not what was written")
