"""The receiving end of the weight transfer inside vLLM's workers, for CPU and for any network.

vLLM imports this module in every worker (`worker_extension_cls`); importing it registers the backend. An engine process
imports it too when its worker lives in it, and from then on dies with the process that owns the engine and logs where that does.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.engine_args import OWNER_PID, WEIGHT_BACKEND
from ray_rl.run_logs import keep_log
from ray_rl.weight_file import sweep_dead
from ray_rl.weight_manifest import TensorEntry, WeightManifest, WeightTransferError, digest_bytes


class WeightReceiverExtension:
    """Mixed into vLLM's workers; its module registers the backend, it adds nothing of its own."""


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on before the first transfer."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Where one version lies on this machine."""

    path: str
    """A flat file: the concatenation of all chunks."""
    manifest: dict[str, Any]
    """A WeightManifest as plain data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapping:
    key: tuple[int, int, int]
    """Device, inode and size of the file."""
    content: memoryview


class SharedMemoryReceiver(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Maps the file, proves every tensor's bytes, then lets the model load them.

    Under tensor parallelism every worker maps the same file, and the model's own `load_weights` takes the worker's shard.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    _half_loaded = False
    _mapping: _Mapping | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: the model is taken apart only after the bytes are proven."""

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load a version.

        Raises:
            WeightTransferError: the file is too short or a tensor's digest differs; the model is untouched. Or an
                earlier transfer broke off while loading, so that the model is in pieces.
        """
        if self._half_loaded:
            raise WeightTransferError("an earlier transfer broke off while loading; this engine must be replaced")
        manifest = WeightManifest.from_dict(update_info.manifest)
        content = self._content(update_info.path)
        prove_digests(manifest, content, threads=torch.get_num_threads())
        self._half_loaded = True
        initialize_layerwise_reload(self.model)
        self.model.load_weights(tensors(manifest, content))

    def finish_weight_update(self) -> None:
        """Put the model together again."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_heads(self.model)
        self._half_loaded = False

    def shutdown(self) -> None:
        """Give the mapped memory back."""
        self._mapping = None

    def _content(self, path: str) -> memoryview:
        # Versions are written into the same file, one after the other: mapping it anew would cost as much as a copy of it.
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            key = (found.st_dev, found.st_ino, found.st_size)
            if self._mapping is None or self._mapping.key != key:
                # A private mapping: torch wants writable memory, and nothing that writes may reach the other engines' pages.
                # What the learner writes shows through, for nothing here does write; else the digests would tell.
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
                self._mapping = _Mapping(key=key, content=content)
        return self._mapping.content


def tensors(manifest: WeightManifest, content: memoryview) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every entry, as views of the content."""
    for entry in manifest.tensors:
        dtype = getattr(torch, entry.dtype)
        count = entry.nbytes // dtype.itemsize
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=entry.offset)
        yield entry.name, flat.reshape(entry.shape)


def prove_digests(manifest: WeightManifest, content: memoryview, *, threads: int) -> None:
    """Compare the digest of every tensor's bytes with the manifest's.

    Raises:
        WeightTransferError: one differs, or the content ends before the last tensor; names the tensors.
    """

    def is_wrong(entry: TensorEntry) -> bool:
        return digest_bytes(content[entry.offset : entry.offset + entry.nbytes]) != entry.digest

    entries = manifest.tensors
    with ThreadPoolExecutor(max(1, threads)) as pool:
        wrong = [entry.name for entry, bad in zip(entries, pool.map(is_wrong, entries), strict=True) if bad]
    if wrong:
        raise WeightTransferError(
            f"version {manifest.version}: the bytes that arrived differ from the learner's in {len(wrong)} of "
            f"{len(entries)} tensors: {', '.join(wrong[:5])}"
        )


def repack_heads(model: torch.nn.Module) -> None:
    """Rebuild the packed copy of every output layer on CPU.

    vLLM's CPU layers multiply with a packed copy of their weights. The layerwise reload renews it where a layer's own weights
    arrive; a head tied to the embedding gets none, and would go on multiplying with the old matrix.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _register() -> None:
    # A second worker in the same process finds the backend registered already.
    if WEIGHT_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(WEIGHT_BACKEND, SharedMemoryReceiver)


def _die_with_owner() -> None:
    """vLLM's engine process does not notice when the process that started it is killed; this one does."""
    owner = int(os.environ.get(OWNER_PID, "0"))
    if owner in (0, os.getpid()):
        return
    threading.Thread(target=_watch, args=(owner, os.getppid()), name="owner-watch", daemon=True).start()


def _watch(owner: int, parent: int) -> None:
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        pass  # it is gone already
    else:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
    try:
        sweep_dead()
    finally:
        if parent not in (owner, 1) and os.getppid() == parent:
            # One worker of several: its parent, vLLM's engine process, must go too.
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


_register()
_die_with_owner()
keep_log("vllm")
