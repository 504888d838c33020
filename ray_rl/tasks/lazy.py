"""Problems that are made when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from ray_rl.types import Problem


class LazyProblems(Sequence[Problem]):
    """`size` problems, of which problem i is `make(i)`; indexing follows the rules of a tuple."""

    def __init__(self, size: int, make: Callable[[int], Problem]) -> None:
        """Make nothing yet.

        Args:
            size: number of problems.
            make: index in range(size) -> problem; the same index gives the same problem.
        """
        self._size = size
        self._make = make

    def __len__(self) -> int:
        """Number of problems."""
        return self._size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        """The problem or problems at an index or slice."""
        if isinstance(index, slice):
            return tuple(self._make(i) for i in range(self._size)[index])
        if not -self._size <= index < self._size:
            raise IndexError(f"problem {index} of {self._size}")
        return self._make(index % self._size)
