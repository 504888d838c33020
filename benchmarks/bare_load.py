"""vLLM's own load of weights that already lie in the worker's memory. Loaded inside the engine's process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weight_receiver import WeightReceiverExtension, repack_heads, tensors
from ray_rl.weight_manifest import WeightManifest


class BareLoadExtension(WeightReceiverExtension):
    """Adds two verbs to vLLM's workers."""

    model_runner: Any
    model_config: Any
    _held: list[tuple[str, torch.Tensor]]

    def hold_weights(self, manifest: dict[str, Any], path: str) -> None:
        """Read the tensors of a flat file into this process's memory, for `bare_load`."""
        content = memoryview(bytearray(Path(path).read_bytes()))
        self._held = list(tensors(WeightManifest.from_dict(manifest), content))

    def bare_load(self) -> float:
        """Seconds of taking the model apart, loading, putting it together, and renewing what vLLM forgets (`repack_heads`)."""
        started = time.perf_counter()
        model = self.model_runner.model
        initialize_layerwise_reload(model)
        model.load_weights(iter(self._held))
        finalize_layerwise_reload(model, self.model_config)
        repack_heads(model)
        return time.perf_counter() - started
