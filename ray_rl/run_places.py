"""Where a run lies, as a user says it: a path, or the URL of a folder in an object store."""

from __future__ import annotations

from pathlib import Path

from ray_rl.config.run import RunConfig
from ray_rl.object_store import ObjectStore, Place, is_url
from ray_rl.run_state import RunFolder
from ray_rl.stored_run import StoredRun, working_copy


def place_of(text: str) -> Place:
    """The place of a path or URL.

    Raises:
        ConfigError: as `ObjectStore.of`.
    """
    return ObjectStore.of(text) if is_url(text) else Path(text)


def create_run(place: Place | None, config: RunConfig) -> RunFolder:
    """As `RunFolder.create`. For a store, also its errors."""
    return StoredRun.make(place, config) if isinstance(place, ObjectStore) else RunFolder.create(place, config)


def open_run(place: Place) -> RunFolder:
    """As `RunFolder.open`. For a store, also its errors."""
    return StoredRun.found(place) if isinstance(place, ObjectStore) else RunFolder.open(place)


def is_run(place: Place) -> bool:
    """As `RunFolder.is_run`. For a store, also its errors."""
    return "config.yaml" in place.sizes() if isinstance(place, ObjectStore) else RunFolder.is_run(place)


def contact_folder(text: str) -> Path:
    """The folder in which `ray_rl.control_client` finds how to reach a run in progress.

    Raises:
        ConfigError: it is on another machine, which the message names, or no run is going on there.
    """
    place = place_of(text)
    return working_copy(place) if isinstance(place, ObjectStore) else place
