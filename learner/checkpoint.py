"""What survives the process: DeepSpeed checkpoints to go on from, and the policy in Hugging Face format.

A folder appears under its name only when it is complete: it is written beside it as `.NAME.partial` and renamed. The
ranks share a file system. Every function is a collective.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ray_rl.errors import ConfigError

if TYPE_CHECKING:
    from learner.engine import LearnerEngine

TAG = "learner"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


class CheckpointError(ConfigError):
    """A checkpoint is missing, or it was made by another number of ranks."""


def save_checkpoint(engine: LearnerEngine, folder: Path) -> None:
    """Weights, master weights, optimizer moments and schedule of all ranks, and a reference that was refreshed.

    A folder of that name is replaced.
    """
    state = {"reference": engine.reference_parameters()}
    _write_whole(
        folder, engine.rank, lambda partial: engine.deepspeed.save_checkpoint(partial, tag=TAG, client_state=state)
    )


def load_checkpoint(engine: LearnerEngine, folder: Path) -> None:
    """The inverse of `save_checkpoint`, for an engine that has not trained yet (ZeRO-3 asks for that).

    Raises:
        CheckpointError: there is none in the folder, or it was saved by another number of ranks.
    """
    if not (folder / TAG).is_dir():
        raise CheckpointError(f"{folder}: no checkpoint of a learner here")
    saved = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
    if saved not in (0, engine.world_size):
        raise CheckpointError(f"{folder}: saved by {saved} ranks, not {engine.world_size}; use learner.ranks={saved}")
    path, state = engine.deepspeed.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed could not read the checkpoint")
    if (reference := state.get("reference")) is not None:
        engine.restore_reference(reference)


def export_model(engine: LearnerEngine, model_path: str | os.PathLike[str], folder: Path) -> None:
    """Configuration, weights in `config.model.dtype` and tokenizer, as transformers and vLLM load them.

    Rank 0 holds the whole policy in CPU memory meanwhile. A folder of that name is replaced.

    Args:
        engine: all ranks' engines.
        model_path: where the policy, and so its tokenizer, came from.
        folder: becomes the export.
    """

    def write(partial: str) -> None:
        weights = _weights_on_rank_0(engine)
        if engine.rank == 0:
            engine.model.save_pretrained(partial, state_dict=weights)
            _copy_tokenizer(engine, model_path, Path(partial))

    _write_whole(folder, engine.rank, write)


def _weights_on_rank_0(engine: LearnerEngine) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in engine.named_parameters_gathered():
        if engine.rank == 0:
            weights[name] = tensor.cpu()
    module = engine.model
    persistent = module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return weights | {name: buffer.cpu() for name, buffer in module.named_buffers() if name in persistent}


def _copy_tokenizer(engine: LearnerEngine, model_path: str | os.PathLike[str], folder: Path) -> None:
    source = Path(model_path)
    if not source.is_dir():
        from transformers import AutoTokenizer

        model = engine.config.model
        AutoTokenizer.from_pretrained(
            model_path, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        ).save_pretrained(folder)
        return
    for file in source.iterdir():
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in TOKENIZER_FILES):
            shutil.copy2(file, folder / file.name)


def _write_whole(folder: Path, rank: int, write: Callable[[str], None]) -> None:
    """Let all ranks write into a temporary folder, then give it its name."""
    partial = folder.with_name(f".{folder.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    write(str(partial))
    torch.distributed.barrier()
    if rank == 0:
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    torch.distributed.barrier()
