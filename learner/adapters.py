"""Low-rank adapters through PEFT: put into a model, switched off, and merged for whoever needs plain weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ray_rl.config.learner import LoraConfig

_BASE = ".base_layer"
"""By which PEFT's layers call the layer that they adapt."""
_ADAPTER = "default"


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Into the model itself, freezing the rest; at first they change nothing. Without dropout, as all of the policy.

    Raises:
        ValueError: no layer has one of the names.
    """
    import peft

    modules = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(settings, model)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model is as it was before any training."""
    layers = list(_adapted(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class PlainParameter:
    """A parameter of the model without adapters, and what its value is made of."""

    def __init__(self, name: str, parameter: nn.Parameter, layer: Any) -> None:
        """Use `plain_parameters`."""
        self.name = name
        """In the model without adapters."""
        self._parameter = parameter
        self._layer = layer

    @property
    def numel(self) -> int:
        """Of the whole, also while it is shared out among ranks."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole, also while it is shared out among ranks."""
        return tuple(getattr(self._parameter, "ds_shape", self._parameter.shape))

    @property
    def sources(self) -> list[nn.Parameter]:
        """Parameters that have to be whole when it is read."""
        if self._layer is None:
            return [self._parameter]
        return [self._parameter, self._layer.lora_A[_ADAPTER].weight, self._layer.lora_B[_ADAPTER].weight]

    def value(self) -> Tensor:
        """With the adapter added; else the parameter itself, not a copy. Knows no gradient."""
        own = self._parameter.detach()
        return own if self._layer is None else own + self._layer.get_delta_weight(_ADAPTER).detach().to(own.dtype)


def plain_parameters(model: nn.Module) -> Iterator[PlainParameter]:
    """Those that the model has without adapters; without any, simply its own."""
    layers = _adapted(model)
    adapters = {id(parameter) for layer in layers.values() for parameter in _of_adapter(layer)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            adapted = layers.get(name.removesuffix(f"{_BASE}.weight"))
            yield PlainParameter(
                name.replace(_BASE, ""), parameter, adapted if name.endswith(f"{_BASE}.weight") else None
            )


def _of_adapter(layer: Any) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
