"""`python -m benchmarks.learner_memory MODEL learner|plain TOKENS FILE`: peak bytes of one pass above model and gradients.

A process of its own, since what a process has allocated once it seldom gives back. Activations are recomputed in both, so
that what is left to compare is the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.learner import make_samples
from learner.batches import PackedBatch, packed_batch
from learner.model import Policy, load_model, model_inputs, vocabulary_size
from ray_rl.config.model import ModelConfig
from ray_rl.types import Microbatch


def main(model_path: Path, variant: str, tokens: int) -> int:
    """Peak resident bytes of the pass, less those before it."""
    model = load_model(ModelConfig(gradient_checkpointing=True), model_path)
    samples = make_samples(tokens, vocabulary=vocabulary_size(model))
    chosen, used = [], 0
    for sample in samples:
        used += len(sample.token_ids)
        if used > tokens:
            break
        chosen.append(sample)
    batch = packed_batch(chosen, Microbatch(indices=tuple(range(len(chosen)))), torch.device("cpu"))
    policy = Policy(model)
    for parameter in model.parameters():
        # What a file is mapped for becomes resident only when it is read, which would look like the pass's own.
        parameter.data = parameter.data.clone()
        parameter.grad = torch.zeros_like(parameter)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    (_plain(model, batch) if variant == "plain" else _ours(policy, batch)).sum().backward()
    return _resident("VmHWM") - before


def _ours(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    return policy(batch.sequences, batch.predicting, batch.targets, 1.0)[0]


def _plain(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    logits = model(**model_inputs(batch.sequences)).logits[0].float()
    chosen = logits.log_softmax(-1)[batch.predicting]
    return chosen.gather(-1, batch.targets.unsqueeze(-1))


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{kind}:"))
    return int(found.split()[1]) * 1024


if __name__ == "__main__":
    _, path, which, count, file = sys.argv
    Path(file).write_text(str(main(Path(path), which, int(count))))
