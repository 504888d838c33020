"""Tiny random models, and engines on them, for the integration tests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.engine import Engine
from ray_rl.config import RunConfig, resolve_config
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import Probe, TensorEntry, WeightManifest, digest_bytes

T = TypeVar("T")

VOCABULARY = 96
EOS = 1
PROBE = tuple(range(2, 26))


def tiny_model(seed: int, *, tied: bool) -> LlamaForCausalLM:
    """Random weights, large enough that different models disagree by whole nats."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=EOS,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def hf_logprobs(model: LlamaForCausalLM, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """[P - 1] of token_ids[1:], by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def probe_of(model: LlamaForCausalLM) -> Probe:
    """What the learner would publish beside this model's weights."""
    return Probe(token_ids=PROBE, logprobs=tuple(hf_logprobs(model, PROBE)))


def write_weights(model: LlamaForCausalLM, version: int, path: Path) -> WeightManifest:
    """The model's parameters as one flat file, and its table of contents."""
    entries, offset = [], 0
    with open(path, "wb") as file:
        for name, parameter in model.named_parameters():
            content = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            entries.append(
                TensorEntry(
                    name=name,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    offset=offset,
                    nbytes=len(content),
                    digest=digest_bytes(content),
                )
            )
            offset += file.write(content)
    return WeightManifest(version=version, tensors=tuple(entries))


def tiny_config(folder: Path, *, running: str = "keep", **rollout: Any) -> RunConfig:
    """float32 on CPU with a small cache."""
    return resolve_config(
        {
            "model": {"path": str(folder), "max_model_len": 512},
            "rollout": {"kv_cache_gib": 0.1, "max_tokens": 64, "group_timeout": 120, **rollout},
            "weights": {"timeout": 60, "running": running},
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """An engine, the event loop that it lives on, and the model that it was started with."""

    engine: Engine
    model: LlamaForCausalLM
    runner: asyncio.Runner

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the engine's loop."""
        return self.runner.run(coroutine)


@contextmanager
def running_engine(folder: Path, *, seed: int, tied: bool, **config: Any) -> Iterator[RunningEngine]:
    """An engine on `tiny_model(seed)`, ended at the end."""
    model = tiny_model(seed, tied=tied)
    model.save_pretrained(folder)
    with asyncio.Runner() as runner:
        started = Engine.start(tiny_config(folder, **config), str(folder), eos_token_ids=[EOS], seed=0)
        engine = runner.run(started)
        try:
            yield RunningEngine(engine=engine, model=model, runner=runner)
        finally:
            engine.shutdown()


async def _start_and_wait(folder: Path, run_id: str) -> None:
    NodeWeightFile(run_id).ensure(1, lambda: [memoryview(b"weights")], timeout=5)
    await Engine.start(tiny_config(folder), str(folder), eos_token_ids=[EOS], seed=0)
    print("ready", flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(_start_and_wait(Path(sys.argv[1]), sys.argv[2]))
