"""The sending end of the weight transfer: gather the parameters, cut them into objects, say what must arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_rl.protocols import PublishedWeights
from ray_rl.weight_manifest import ObjectStorePayload, Probe, TensorEntry, WeightManifest, digest_bytes

PROBE_TOKENS = 24

_MIB = 1024**2
_ALIGNMENT = 64


class WeightOwner(Protocol):
    """What a publisher needs of the learner's engine. All ranks make the same calls in lockstep."""

    rank: int
    world_size: int
    vocab_size: int

    def named_parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and full tensor of every parameter, in the engines' number format; tied ones once."""

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """[P - 1] natural-log probabilities, at temperature 1, of token_ids[1:] ([P] given)."""


def ray_put(chunk: np.ndarray) -> Any:
    """Copy a chunk into Ray's object store."""
    import ray

    return ray.put(chunk)


def probe_prompt(vocab_size: int) -> tuple[int, ...]:
    """[PROBE_TOKENS] pseudo-random token ids, the same for every version and on every rank."""
    random = Random(0)
    return tuple(random.randrange(vocab_size) for _ in range(PROBE_TOKENS))


class ObjectStorePublisher:
    """Publishes through an object store; any network, CPU and GPU."""

    def __init__(self, engine: WeightOwner, chunk_mib: int, put: Callable[[np.ndarray], Any] = ray_put) -> None:
        """Publish an engine's parameters.

        Args:
            engine: of this rank.
            chunk_mib: size of one object.
            put: stores a copy of a uint8 array and returns its reference.
        """
        self._engine = engine
        self._chunk_bytes = chunk_mib * _MIB
        self._put = put

    def publish(self, version: int) -> PublishedWeights | None:
        """Put the present weights into the store. A collective: every rank calls it.

        Returns:
            On rank 0 the version with an `ObjectStorePayload`; None on the others, which only take part in gathering.
        """
        prompt = probe_prompt(self._engine.vocab_size)
        probe = Probe(token_ids=prompt, logprobs=tuple(self._engine.logprobs(prompt)))
        if self._engine.rank != 0:
            for _ in self._engine.named_parameters_gathered():
                pass
            return None
        writer = _ChunkWriter(self._chunk_bytes, self._put)
        entries = tuple(_entry(name, tensor, writer) for name, tensor in self._engine.named_parameters_gathered())
        manifest = WeightManifest(version=version, tensors=entries)
        payload = ObjectStorePayload(manifest=manifest, chunks=writer.finish(), probe=probe)
        return PublishedWeights(version=version, payload=payload)


class _ChunkWriter:
    """Cuts a stream of bytes into stored arrays of equal size, the last one shorter."""

    def __init__(self, chunk_bytes: int, put: Callable[[np.ndarray], Any]) -> None:
        self._put = put
        self._buffer = np.empty(chunk_bytes, dtype=np.uint8)
        self._filled = 0
        self._refs: list[Any] = []

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return len(self._refs) * len(self._buffer) + self._filled

    def align(self) -> None:
        """Fill up with zeros to where a tensor of any number format may start."""
        self.write(np.zeros(-self.offset % _ALIGNMENT, dtype=np.uint8))

    def write(self, content: np.ndarray) -> None:
        """Append uint8 [n]."""
        start = 0
        while start < len(content):
            taken = min(len(content) - start, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = content[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == len(self._buffer):
                self._store()

    def finish(self) -> tuple[Any, ...]:
        """References to all chunks, in order."""
        if self._filled:
            self._store()
        return tuple(self._refs)

    def _store(self) -> None:
        self._refs.append(self._put(self._buffer[: self._filled]))
        self._filled = 0


def _entry(name: str, tensor: Tensor, writer: _ChunkWriter) -> TensorEntry:
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    writer.align()
    offset = writer.offset
    writer.write(content)
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset=offset,
        nbytes=len(content),
        digest=digest_bytes(memoryview(content)),
    )
