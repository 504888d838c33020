"""What both ends of a weight transfer agree on: names, shapes, formats, places and digests of one published version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from ray_rl.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a published version. Offsets count bytes in the concatenation of all chunks."""

    name: str
    """Hugging Face parameter name."""
    shape: tuple[int, ...]
    dtype: str
    """A torch format without its prefix, for instance `float32`."""
    offset: int
    nbytes: int
    digest: str
    """Of the tensor's bytes (`digest_bytes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Table of contents of one published version."""

    version: int
    tensors: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a channel that knows no classes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WeightManifest:
        """The inverse of `to_dict`."""
        tensors = tuple(TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["tensors"])
        return cls(version=data["version"], tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed prompt and the log-probabilities that an engine with the published weights must give it.

    It shows what the engine multiplies with, which digests of module tensors cannot (prepacked weights on CPU).
    """

    token_ids: tuple[int, ...]
    """[P]"""
    logprobs: tuple[float, ...]
    """[P - 1] of token_ids[1:], natural log, temperature 1, by the learner."""

    def largest_difference(self, logprobs: Sequence[float]) -> float:
        """Largest absolute difference from [P - 1] log-probabilities of an engine."""
        return max(abs(ours - theirs) for ours, theirs in zip(self.logprobs, logprobs, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStorePayload:
    """Where a version lies: a file in the memory of the learner's node, and Ray's object store for the others."""

    manifest: WeightManifest
    chunks: tuple[Any, ...]
    """References to uint8 arrays; end to end they are what the manifest's offsets count in. None where only engines that see the
    learner's file are to have the version."""
    home: str
    """`NodeWeightFile.identity` of the learner's node, where the file is unless there are chunks and no engine."""


def digest_bytes(data: bytes | memoryview) -> str:
    """XXH3, 128 bits, in hexadecimal: it finds every accident at the speed of memory. It is no protection against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


class WeightTransferError(RunError):
    """A proof failed: the weights that arrived, or that the engine multiplies with, are not the learner's."""
