"""How much memory and disk a recipe takes, from the size of its model. Estimates: activations are left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ray_rl.config import RunConfig
from ray_rl.embedded import policy_path

GIB = 2**30
_PROCESS = GIB
"""Of a process that has imported torch, vLLM or DeepSpeed, and for the driver with its Ray; as the laptop recipes have it."""
_CPU_CACHE = GIB
"""vLLM's cache on CPU where `rollout.kv_cache_gib` is unset."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a run takes, in bytes."""

    weights: int
    """One copy in `model.dtype`: what a publication writes into shared memory."""
    rank_device: int
    """Of one learner rank on its GPU; 0 without one."""
    rank_host: int
    """Of one learner rank in the memory of its node."""
    engine_device: int
    """Of one engine on each of its GPUs, without its cache; 0 without GPUs."""
    engine_host: int
    """Of one engine in the memory of its node."""
    checkpoint: int
    """On disk."""

    @classmethod
    def of(cls, config: RunConfig, *, parameters: int, hidden_size: int | None = None) -> Footprint:
        """From a configuration and its model.

        Args:
            config: of the run.
            parameters: weights of the model.
            hidden_size: width of the model, by which LoRA's adapters are estimated; unset, they count as all weights.
        """
        learner, rollout = config.learner, config.rollout
        weights = parameters * (4 if config.model.dtype == "float32" else 2)
        state, update, trained = _learner_bytes(config, parameters, weights, hidden_size)
        offloaded = update if learner.offload_optimizer or not learner.gpus_per_rank else 0
        on_host = _PROCESS + offloaded + (0 if learner.gpus_per_rank else state)
        cache = int(rollout.kv_cache_gib * GIB) if rollout.kv_cache_gib else _CPU_CACHE
        return cls(
            weights=weights,
            rank_device=state + update - offloaded if learner.gpus_per_rank else 0,
            rank_host=on_host,
            engine_device=weights // rollout.tensor_parallel if rollout.gpus_per_actor else 0,
            engine_host=_PROCESS + (0 if rollout.gpus_per_actor else weights + cache),
            checkpoint=2 * weights + trained * _update_bytes(config),
        )

    def on_one_machine(self, config: RunConfig, rollout_actors: int) -> int:
        """Memory of all that runs when one machine has it all: driver, ranks, engines, and the weights in shared memory."""
        ranks, engines = config.learner.ranks * self.rank_host, rollout_actors * self.engine_host
        return _PROCESS + ranks + engines + self.weight_files(config)

    def weight_files(self, config: RunConfig) -> int:
        """Shared memory of each node that engines get their weights through; a version is written over the one before it."""
        return 0 if config.weights.kind == "nccl" else self.weights


def _learner_bytes(config: RunConfig, parameters: int, weights: int, hidden_size: int | None) -> tuple[int, int, int]:
    """Of one rank: weights, gradients and reference; master weights and moments; and how many weights train, over all ranks."""
    learner = config.learner
    stage = learner.zero_stage if config.model.dtype == "float32" else max(learner.zero_stage, 1)
    share = {True: learner.ranks, False: 1}
    trained = parameters
    if learner.lora is not None and hidden_size:
        # A matrix of h x h gets 2 r h weights more; PEFT's other shapes are close to that.
        trained = min(parameters, 2 * learner.lora.rank * parameters // hidden_size)
    copies = 2 if learner.kl.coefficient and learner.lora is None and not learner.kl.offload_reference else 1
    state = copies * weights // share[stage >= 3] + 4 * trained // share[stage >= 2]
    return state, trained * _update_bytes(config) // share[stage >= 1], trained


def _update_bytes(config: RunConfig) -> int:
    """Per weight that trains: AdamW's two moments, and a master weight beside a 16-bit one, in float32."""
    return 8 if config.model.dtype == "float32" else 12


def is_on_hub(config: RunConfig) -> bool:
    """Whether the model is a name on the Hugging Face hub: what its cache lacks is fetched from there."""
    return config.model.path != "embedded" and not Path(config.model.path).expanduser().is_dir()


def model_folder(config: RunConfig) -> Path | None:
    """Where the model lies on this machine, the cache of the Hugging Face hub included; None when it is not here."""
    path = config.model.path
    if not is_on_hub(config):
        return policy_path() if path == "embedded" else Path(path).expanduser()
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "config.json", revision=config.model.revision)
    except ValueError:  # no name that the hub could know
        return None
    return Path(found).parent if isinstance(found, str) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file that a tokenizer can be made of."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def has_weights(folder: Path) -> bool:
    """Whether no file of weights is missing; whether each is whole is for `ray_rl.model_files` to say, and so is a bad index."""
    for index in (folder / f"{name}.index.json" for name in _WHOLE_WEIGHTS):
        if index.is_file() and not (folder / _WHOLE_WEIGHTS[0]).is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return all((folder / name).is_file() for name in names)
            except (OSError, AttributeError, LookupError, TypeError, ValueError):
                return True
    return any((folder / name).is_file() for name in _WHOLE_WEIGHTS)


def hidden_size(folder: Path) -> int | None:
    """Width of the model in a folder, where its config.json tells."""
    width = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("hidden_size")
    return width if isinstance(width, int) and width > 0 else None


def count_parameters(folder: Path) -> int | None:
    """Weights of a model that `ray_rl.model_files` has looked at, from the headers of its safetensors files.

    None where it has none, or where their headers do not tell.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        names = {single.name}
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        return None
    try:
        return sum(_count(folder / name) for name in names)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _count(path: Path) -> int:
    """Elements of all tensors in a safetensors file: 8 bytes length, a JSON header of that length, the tensors' bytes."""
    with path.open("rb") as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")
