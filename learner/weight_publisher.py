"""The sending end of the weight transfer: gather the parameters, write them where engines find them, say what must arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_rl.weight_file import NodeWeightFile, write_at
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
        engines_here: bool,
        engines_elsewhere: bool,
        put: Callable[[np.ndarray], Any] = ray_put,
    ) -> None:
        """Publish an engine's parameters.

        Args:
            engine: of this rank.
            files: of the run on this node.
            chunk_mib: size of one object.
            timeout: seconds to wait for another writer of the file.
            engines_here: whether a rollout engine sees the files; else each is removed once its objects are stored.
            engines_elsewhere: whether a rollout engine does not, so that objects are needed.
            put: stores a copy of a uint8 array and returns its reference.
        """
        self._engine = engine
        self._files = files
        self._chunk_bytes = chunk_mib * _MIB
        self._timeout = timeout
        self._engines_here = engines_here
        self._engines_elsewhere = engines_elsewhere
        self._put = put

    def publish(self, version: int) -> ObjectStorePayload | None:
        """Put the present weights where all engines find them. A collective: every rank calls it.

        Returns:
            On rank 0 what the engines need; None on the others, which only take part in gathering.
        """
        if self._engine.rank != 0:
            for _ in self._engine.named_parameters_gathered():
                pass
            return None
        entries: list[TensorEntry] = []

        def fill(descriptor: int) -> int:
            entries.extend(_write(self._engine.named_parameters_gathered(), descriptor))
            return entries[-1].offset + entries[-1].nbytes

        self._files.remove(version)  # what an earlier attempt may have left
        path = self._files.ensure_filled(version, fill, timeout=self._timeout)
        chunks = self._stored(path) if self._engines_elsewhere else ()
        if not self._engines_here:
            self._files.remove(version)
        manifest = WeightManifest(version=version, tensors=tuple(entries))
        return ObjectStorePayload(manifest=manifest, chunks=chunks)

    def _stored(self, path: Path) -> tuple[Any, ...]:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        starts = range(0, len(content), self._chunk_bytes)
        return tuple(self._put(content[start : start + self._chunk_bytes]) for start in starts)


def _write(parameters: Iterable[tuple[str, Tensor]], descriptor: int) -> list[TensorEntry]:
    """Write tensors one behind the other, several at a time."""
    threads = max(1, torch.get_num_threads())
    entries: list[Future[TensorEntry]] = []
    offset = 0
    with ThreadPoolExecutor(threads) as pool:
        for name, tensor in parameters:
            if len(entries) >= 2 * threads:
                entries[-2 * threads].result()  # gathered tensors must not pile up
            entries.append(pool.submit(_write_one, name, tensor, descriptor, offset))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return [entry.result() for entry in entries]


def _write_one(name: str, tensor: Tensor, descriptor: int, offset: int) -> TensorEntry:
    content = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
    digest = digest_bytes(content)
    write_at(descriptor, content, offset)
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset=offset,
        nbytes=len(content),
        digest=digest,
    )
