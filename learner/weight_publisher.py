"""The sending end of the weight transfer: gather the parameters, write them where engines find them, say what must arrive."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_rl.deadlines import result
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, Probe, TensorEntry, WeightManifest, digest_bytes

PROBE_TOKENS = 24

_MIB = 1024**2
_ALIGNMENT = 64


class WeightOwner(Protocol):
    """What a publisher needs of the learner's engine. All ranks make the same calls in lockstep."""

    rank: int
    world_size: int
    vocab_size: int
    device: torch.device

    def parameter_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and shape of what `named_parameters_gathered` gives, in its order. No collective."""

    def parameter_bytes(self) -> list[int]:
        """Sizes of what `named_parameters_gathered` gives, in its order. No collective."""

    def named_parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and full tensor of every parameter, in the engines' number format; tied ones once."""

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """[P - 1] natural-log probabilities, at temperature 1, of token_ids[1:] ([P] given)."""


def ray_put(chunk: np.ndarray) -> Any:
    """Copy a chunk into Ray's object store."""
    import ray

    return ray.put(chunk)


def make_probe(engine: WeightOwner) -> Probe:
    """Of the present weights: [PROBE_TOKENS] pseudo-random token ids, the same for every version. A collective."""
    random = Random(0)
    prompt = tuple(random.randrange(engine.vocab_size) for _ in range(PROBE_TOKENS))
    return Probe(token_ids=prompt, logprobs=tuple(engine.logprobs(prompt)))


class ObjectStorePublisher:
    """Publishes through a file in this node's memory, and through an object store to other nodes. CPU and GPU."""

    def __init__(
        self,
        engine: WeightOwner,
        files: NodeWeightFile,
        *,
        chunk_mib: int,
        timeout: float,
        put: Callable[[np.ndarray], Any] = ray_put,
    ) -> None:
        """Publish an engine's parameters.

        Args:
            engine: of this rank.
            files: of the run on this node.
            chunk_mib: size of one object.
            timeout: seconds to wait for another writer of the file, or for one tensor to be copied.
            put: stores a copy of a uint8 array and returns its reference.
        """
        self._engine = engine
        self._files = files
        self._chunk_bytes = chunk_mib * _MIB
        self._timeout = timeout
        self._put = put
        self._mapping: tuple[tuple[int, int], np.ndarray] | None = None

    def publish(self, version: int, homes: Collection[str], *, stored: bool) -> ObjectStorePayload | None:
        """Put the present weights where all engines find them. A collective: every rank calls it.

        Args:
            version: its label.
            homes: of the engines that are to have it now (`NodeWeightFile.identity`).
            stored: whether engines of other nodes may ask for it later, so that objects are needed in any case. Where they are
                made and no engine is on this node, the file is removed.

        Returns:
            On rank 0 what the engines need; None on the others, which only take part in gathering.

        Raises:
            NotWritten: this node's memory is full.
        """
        if self._engine.rank != 0:
            for _ in self._engine.named_parameters_gathered():
                pass
            return None
        entries: list[TensorEntry] = []
        parameters = self._engine.named_parameters_gathered()
        try:
            path = self._files.write(
                version, lambda file: self._write(file, parameters, entries), timeout=self._timeout
            )
        finally:
            for _ in parameters:  # where writing failed: the other ranks are amid gathering
                pass
        home = self._files.identity
        chunks = self._stored(path) if stored or any(other != home for other in homes) else ()
        if chunks and home not in homes:
            self._files.remove(version)
        manifest = WeightManifest(version=version, tensors=tuple(entries))
        return ObjectStorePayload(manifest=manifest, chunks=chunks, home=home)

    def _write(self, descriptor: int, parameters: Iterator[tuple[str, Tensor]], entries: list[TensorEntry]) -> int:
        """Fill a file with all parameters, several at a time; its size."""
        ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in self._engine.parameter_bytes()))
        content, threads = self._mapped(descriptor, ends[-1]), max(1, torch.get_num_threads())
        written: list[Future[TensorEntry]] = []
        pool = ThreadPoolExecutor(threads)
        try:
            for (name, tensor), offset in zip(parameters, [0, *ends], strict=False):
                if len(written) >= 2 * threads:
                    self._entry(written[-2 * threads])  # gathered tensors must not pile up
                written.append(pool.submit(_write_one, name, tensor, content, offset))
            entries.extend(self._entry(future) for future in written)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return ends[-1]

    def _entry(self, written: Future[TensorEntry]) -> TensorEntry:
        return result(written, self._timeout, what="a tensor to be copied into shared memory")

    def _mapped(self, descriptor: int, size: int) -> np.ndarray:
        """uint8 [size] of a file; the mapping of one that is written over and over is kept, for making it is the slow part."""
        found = os.fstat(descriptor)
        if self._mapping is None or self._mapping[0] != (found.st_dev, found.st_ino) or len(self._mapping[1]) != size:
            self._mapping = None  # a file that was removed keeps its memory while it is mapped
            # Else a full memory would be told by a signal that nobody survives.
            os.posix_fallocate(descriptor, 0, size)
            content = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
            self._mapping = ((found.st_dev, found.st_ino), content)
        return self._mapping[1]

    def _stored(self, path: Path) -> tuple[Any, ...]:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        starts = range(0, len(content), self._chunk_bytes)
        return tuple(self._put(content[start : start + self._chunk_bytes]) for start in starts)


def _write_one(name: str, tensor: Tensor, content: np.ndarray, offset: int) -> TensorEntry:
    given = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    place = content[offset : offset + len(given)]
    place[:] = given
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset=offset,
        nbytes=len(given),
        digest=digest_bytes(memoryview(given)),
    )
