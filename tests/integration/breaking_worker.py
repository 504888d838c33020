"""A worker extension that breaks the engine on purpose, for the proofs to notice. Loaded inside the engine's process."""

from __future__ import annotations

import torch

from actors import weight_receiver

_REPACK_HEADS = weight_receiver.repack_heads


def _leave_heads(model: torch.nn.Module) -> None:
    """Instead of repack_heads: the tied head goes on multiplying with the matrix that it packed before."""


class BreakingExtension(weight_receiver.WeightReceiverExtension):
    """Adds one verb to vLLM's workers."""

    def skip_repacking_heads(self, skip: bool) -> None:
        """Whether the next transfers leave out the repacking of the output layers."""
        weight_receiver.repack_heads = _leave_heads if skip else _REPACK_HEADS
