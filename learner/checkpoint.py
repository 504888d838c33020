"""What survives the process: DeepSpeed checkpoints to go on from, and the policy in Hugging Face format.

A folder appears under its name only when it is complete: it is written beside it as `.NAME.partial` and renamed. The
ranks share a file system. Every function is a collective, and fails on all ranks when it fails on one: a rank that left amid
the others' collectives would leave them waiting.
"""

from __future__ import annotations

import fnmatch
import os
import pickle
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from ray_rl.errors import ConfigError, NotWritten, RunError

if TYPE_CHECKING:
    from learner.engine import LearnerEngine

T = TypeVar("T")

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
_GIB = 2**30
_REASON_CHARACTERS = 400
_UNWRITTEN = (OSError, SafetensorError)
_UNREADABLE = (
    OSError, EOFError, pickle.UnpicklingError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ImportError,
    AssertionError, MemoryError,
)  # fmt: skip
"""What torch and DeepSpeed say to files that are cut, damaged or of another model."""


class CheckpointError(ConfigError):
    """A checkpoint is missing or damaged, or it was made by another number of ranks or of another model."""


class CheckpointNotWritten(NotWritten):
    """A checkpoint or an export found no room or no permission; a folder that had its name is untouched."""


def save_checkpoint(engine: LearnerEngine, folder: Path, *, shared: bool = True) -> None:
    """Weights, master weights, optimizer moments and schedule of all ranks, and a reference that was refreshed.

    A folder of that name is replaced.

    Args:
        engine: all ranks' engines.
        folder: becomes the checkpoint.
        shared: whether that is one folder for all ranks. Otherwise it is another one for each, and has its files only.

    Raises:
        CheckpointNotWritten: there is no room, or no permission.
    """
    state = {"reference": engine.reference_parameters()}

    def write(partial: Path) -> None:
        with _failures_told_afterwards(engine.deepspeed):
            engine.deepspeed.save_checkpoint(str(partial), tag=TAG, client_state=state, save_latest=False)
        if engine.rank == 0:
            (partial / "latest").write_text(TAG)  # for DeepSpeed's own tools

    at_least = _least_bytes(engine) // (1 if shared else engine.world_size)
    _write_whole(engine, folder, write, at_least=at_least, shared=shared)


def load_checkpoint(engine: LearnerEngine, folder: Path) -> None:
    """The inverse of `save_checkpoint`, for an engine that has not trained yet (ZeRO-3 asks for that).

    Raises:
        CheckpointError: there is none in the folder, it cannot be read, or it was saved by another number of ranks.
    """

    def failed(reason: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {reason}")

    read = by_all(engine, lambda: _read(engine, folder), _UNREADABLE, failed)

    def restore() -> dict[str, Any]:
        with _from_memory(engine.deepspeed, read), _misfit("it does not fit this learner"):
            path, state = engine.deepspeed.load_checkpoint(str(folder), tag=TAG)
            if path is None:
                raise ValueError("DeepSpeed finds nothing in it")
        return state

    state = by_all(engine, restore, _UNREADABLE, failed)
    if (reference := state.get("reference")) is not None:
        engine.restore_reference(reference)


def export_model(engine: LearnerEngine, model_path: str | os.PathLike[str], folder: Path) -> None:
    """Configuration, weights in `config.model.dtype` and tokenizer, as transformers and vLLM load them.

    Rank 0 holds the whole policy in CPU memory meanwhile. A folder of that name is replaced.

    Args:
        engine: all ranks' engines.
        model_path: where the policy, and so its tokenizer, came from.
        folder: becomes the export.

    Raises:
        CheckpointNotWritten: there is no room, or no permission.
    """

    def write(partial: Path) -> None:
        weights = _weights_on_rank_0(engine)
        if engine.rank == 0:
            engine.model.save_pretrained(partial, state_dict=weights)
            for file in partial.glob("*.safetensors"):  # safetensors makes them for their owner alone
                shutil.copymode(partial / "config.json", file)
            _copy_tokenizer(engine, model_path, partial)

    _write_whole(engine, folder, write, at_least=sum(engine.parameter_bytes()))


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


def _write_whole(
    engine: LearnerEngine, folder: Path, write: Callable[[Path], None], *, at_least: int, shared: bool = True
) -> None:
    """Let all ranks write into a temporary folder, which rank 0 makes if it has room, then give it its name.

    Where the folder is not shared, every rank makes its own.
    """
    makes = engine.rank == 0 or not shared
    partial = folder.with_name(f".{folder.name}.partial")

    def failed(reason: str) -> CheckpointNotWritten:
        return CheckpointNotWritten(
            f"{folder}: could not be written: {reason}; make room there, or check its permissions"
        )

    def by_makers(act: Callable[[], None]) -> None:
        by_all(engine, act if makes else lambda: None, _UNWRITTEN, failed)

    try:
        by_makers(lambda: _make_with_room(partial, at_least))
        by_all(engine, lambda: write(partial), _UNWRITTEN, failed)
        by_makers(lambda: _replace(folder, partial))
    except CheckpointNotWritten:
        if makes:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_with_room(partial: Path, at_least: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < at_least:
        raise OSError(f"it takes more than {at_least / _GIB:.3g} GiB, and {free / _GIB:.3g} GiB are free")


def _replace(folder: Path, partial: Path) -> None:
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _least_bytes(engine: LearnerEngine) -> int:
    """What a checkpoint takes at the very least: the policy, and a float32 number per trained parameter for the optimizer."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters() if p.requires_grad)
    return sum(engine.parameter_bytes()) + 4 * trained


def by_all(
    engine: LearnerEngine,
    act: Callable[[], T],
    errors: tuple[type[Exception], ...],
    failed: Callable[[str], RunError],
) -> T:
    """Let every rank act, and make the failure of one that of all.

    Args:
        engine: this rank's.
        act: without collectives, or such that it fails before or after them.
        errors: that count as a failure.
        failed: makes the error of a reason; all ranks raise that of the first one that failed.
    """
    done: list[T] = []
    reason: str | None = None
    cause: Exception | None = None
    try:
        done.append(act())
    except errors as error:
        cause, reason = error, textwrap.shorten(str(error), _REASON_CHARACTERS) or type(error).__name__
    reasons: list[str | None] = [None] * engine.world_size
    torch.distributed.all_gather_object(reasons, reason)
    if first := next(filter(None, reasons), None):
        raise failed(first) from cause
    return done[0]


@contextmanager
def _failures_told_afterwards(deepspeed: Any) -> Iterator[None]:
    """Let DeepSpeed, which has barriers between its files, go on when one cannot be written, and raise OSError at the end."""
    failures: list[Exception] = []

    def postponed(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            if not failures:
                try:
                    write(*args, **kwargs)
                except (OSError, RuntimeError) as error:  # torch.save raises the latter
                    failures.append(error)

        return attempt

    files = deepspeed.checkpoint_engine
    with (
        _overriding(files, save=postponed(files.save), makedirs=postponed(files.makedirs)),
        _overriding(deepspeed, _copy_recovery_script=postponed(deepspeed._copy_recovery_script)),
    ):
        yield
    if failures:
        raise OSError(str(failures[0])) from failures[0]


@contextmanager
def _from_memory(deepspeed: Any, read: dict[str, Any]) -> Iterator[None]:
    """Let DeepSpeed load what `_read` has read."""
    load = deepspeed.checkpoint_engine.load

    def found(path: str, *args: Any, **kwargs: Any) -> Any:
        return read.pop(path) if path in read else load(path, *args, **kwargs)

    with _overriding(deepspeed.checkpoint_engine, load=found):
        yield


@contextmanager
def _overriding(target: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Give one object other methods than its class has."""
    vars(target).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(target)[name]


def _read(engine: LearnerEngine, folder: Path) -> dict[str, Any]:
    """What this rank's files of a checkpoint hold, by path as DeepSpeed names it.

    Raises:
        ValueError: the checkpoint is missing or other ranks' (or what else is in _UNREADABLE).
    """
    if not (folder / TAG).is_dir():
        raise ValueError("no checkpoint of a learner here")
    saved = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
    if saved not in (0, engine.world_size):
        raise ValueError(f"saved by {saved} ranks, not {engine.world_size}; use learner.ranks={saved}")
    read: dict[str, Any] = {}
    for path in own_files(engine, folder):
        with _misfit(f"{Path(path).name} is damaged or missing"):
            read[path] = engine.deepspeed.checkpoint_engine.load(path, map_location="cpu")
    return read


def own_files(engine: LearnerEngine, folder: Path) -> list[str]:
    """What this rank reads of a checkpoint: paths as DeepSpeed names them."""
    deepspeed = engine.deepspeed
    paths = [deepspeed._get_ckpt_name(str(folder), TAG)]
    if deepspeed.zero_optimization():
        paths.append(deepspeed._get_zero_ckpt_name(str(folder), TAG))
    return paths


@contextmanager
def _misfit(what: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
