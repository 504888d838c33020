"""The working folder that a job takes along: which files Ray would send, whether they are all there, and few enough."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_rl.errors import ConfigError

logger = logging.getLogger(__name__)

PROGRAM = ("ray_rl", "actors", "learner", "benchmarks")
"""What every job needs of ray-rl, so that nothing of it must be installed on a cluster."""
IGNORE_FILE = ".rayignore"
_MOST_BYTES = 100 * 2**20
"""The head node keeps the folder in its memory, and each node gets a copy. Ray's own limit is 512 MiB."""
_NAMED = 5
"""Largest files that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingFolder:
    """A folder as a job will find it."""

    path: Path
    """Absolute."""
    files: Mapping[str, int]
    """Those that are not ignored: path from the folder, with slashes -> bytes."""

    @classmethod
    def read(cls, path: Path) -> WorkingFolder:
        """Look through a folder by Ray's rules: .gitignore and .rayignore at every level, and what it always leaves out.

        Raises:
            ConfigError: something in it cannot be read.
        """
        # Ray has no public function that lists what it would send; tests/ray_rl/test_working_folder.py compares with its archive.
        from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

        path = path.resolve()
        files: dict[str, int] = {}

        def add(found: Path) -> None:
            if found.is_file():
                files[found.relative_to(path).as_posix()] = found.stat().st_size

        excludes = [_get_excludes(path, get_runtime_env_default_excludes())]
        honours_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
        try:
            _dir_travel(path, excludes, add, include_gitignore=honours_gitignore, logger=logger)
        except OSError as error:
            raise ConfigError(
                f"working folder: {error.filename or path} cannot be read: {error.strerror}; name it in {IGNORE_FILE}"
            ) from error
        return cls(path=path, files=files)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def check(self) -> None:
        """Raise ConfigError when the program is not in it, or when it is too large to be sent."""
        missing = [name for name in PROGRAM if not self.holds(f"{name}/__init__.py")]
        if missing:
            raise ConfigError(
                f"working folder: {self.path} lacks {', '.join(missing)}, or an ignore file names them; run `ray-rl submit` in "
                "the checkout of ray-rl, with recipes and reward files of yours in it"
            )
        if self.bytes > _MOST_BYTES:
            largest = sorted(self.files.items(), key=lambda entry: entry[1], reverse=True)[:_NAMED]
            named = ", ".join(f"{name} ({_mib(size)})" for name, size in largest)
            raise ConfigError(
                f"working folder: {self.path} has {_mib(self.bytes)} to send, and at most {_mib(_MOST_BYTES)} are; put data and "
                f"models on storage that the nodes share, and name here what stays in {IGNORE_FILE}; the largest: {named}"
            )

    def holds(self, name: str) -> bool:
        """Whether a file, or something below a folder, is sent."""
        name = os.path.normpath(name)
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)

    def relative(self, path: str, *, option: str) -> str:
        """The name by which a job finds a file or folder that is here.

        Args:
            path: as the user gave it, from the working folder or absolute.
            option: it belongs to, for messages.

        Raises:
            ConfigError: it lies elsewhere, or is left out.
        """
        whole = Path(path).expanduser().resolve()
        if not whole.is_relative_to(self.path):
            raise ConfigError(
                f"{option}: {path} lies outside of the working folder {self.path}, which is all that a job takes along; put it "
                "in there"
            )
        name = whole.relative_to(self.path).as_posix()
        if not self.holds(name):
            raise ConfigError(
                f"{option}: {name} stays here, since .gitignore or {IGNORE_FILE} names it; take it out there"
            )
        return name

    def __str__(self) -> str:
        """For the user."""
        return f"{self.path} ({len(self.files)} files, {_mib(self.bytes)})"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
