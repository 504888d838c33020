"""The learner over a bare PyTorch loop on the same packed microbatches, and its peak memory over keeping all logits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.fetch_smollm2 import ensure
from benchmarks.suite import Case, CaseResult, Options, median
from ray_rl.config import RunConfig, resolve_config
from ray_rl.embedded import policy_path
from ray_rl.types import TrainingSample

_PROMPT, _COMPLETION = 64, 128
_GROUP = 8
_MEMORY_TOKENS = 4096


def run(options: Options) -> CaseResult:
    """Alternate the variants; each of them trains a copy of the same model."""
    smollm2 = ensure(options.work)
    # The second is of a size at which a step takes seconds, and has a real vocabulary.
    subjects = {"embedded": (policy_path(), 64), "smollm2": (smollm2, 8 if options.quick else 16)}
    rows, ratios = [], {}
    details: dict[str, Mapping[str, Sequence[float]]] = {}
    for subject, (path, count) in subjects.items():
        samples = make_samples(count, vocabulary=_vocabulary(path))
        seconds = _seconds(path, samples, 2 if options.quick else options.repeats)
        tokens = sum(len(sample.token_ids) for sample in samples)
        details[subject] = seconds
        bare = median(seconds["bare loop"])
        rows += [
            {
                "subject": subject,
                "variant": name,
                "tokens/s": tokens / median(of_variant),
                "over bare": bare / median(of_variant),
            }
            for name, of_variant in seconds.items()
        ]
        grouped = make_samples(count, vocabulary=_vocabulary(path), group=_GROUP)
        sharing = _seconds_of(
            {
                "prompts repeated": _learner(path, grouped, "learner.share_prefixes=false"),
                "prompts shared": _learner(path, grouped),
            },
            2 if options.quick else options.repeats,
        )
        details[f"{subject}, groups of {_GROUP}"] = sharing
        ratios[subject] = {
            "learner_over_bare": bare / median(seconds["learner, logits kept"]),
            "learner_over_bare_recomputing": bare / median(seconds["learner"]),
            "sharing_over_repeating": median(
                [a / b for a, b in zip(sharing["prompts repeated"], sharing["prompts shared"], strict=True)]
            ),
        }
    peaks = {name: _peak_bytes(smollm2, name) for name in ("learner", "plain")}
    headline = {
        "learner_over_bare": {subject: of["learner_over_bare"] for subject, of in ratios.items()},
        "learner_over_bare_recomputing": {
            subject: of["learner_over_bare_recomputing"] for subject, of in ratios.items()
        },
        "sharing_over_repeating": {subject: of["sharing_over_repeating"] for subject, of in ratios.items()},
        "memory_over_plain": peaks["learner"] / peaks["plain"],
    }
    return CaseResult(headline=headline, rows=rows, details={"seconds": details, "peak bytes": peaks})


def make_samples(count: int, *, vocabulary: int, seed: int = 0, group: int = 1) -> list[TrainingSample]:
    """Random tokens; completions of half to all of the longest length, `group` of them to a prompt."""
    draw = random.Random(seed)
    samples = []
    for index in range(count):
        if index % group == 0:
            prompt = tuple(draw.randrange(vocabulary) for _ in range(_PROMPT))
        length = draw.randint(_COMPLETION // 2, _COMPLETION)
        samples.append(
            TrainingSample(
                token_ids=prompt + tuple(draw.randrange(vocabulary) for _ in range(length)),
                loss_mask=(False,) * _PROMPT + (True,) * length,
                behavior_logprobs=(0.0,) * _PROMPT + (-3.0,) * length,
                advantages=(0.0,) * _PROMPT + (1.0 if index % 2 else -1.0,) * length,
                weights=(0.0,) * _PROMPT + (1.0,) * length,
            )
        )
    return samples


def _vocabulary(path: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path).vocab_size)


def _seconds(path: Path, samples: Sequence[TrainingSample], repeats: int) -> dict[str, list[float]]:
    """Of an optimizer step on all samples, for each variant."""
    steps = {
        "bare loop": _bare_loop(path, samples),
        # Without sharing, for the same microbatches.
        "learner, logits kept": _learner(path, samples, "learner.share_prefixes=false", "learner.recompute_head=false"),
        "learner": _learner(path, samples, "learner.share_prefixes=false"),
    }
    return _seconds_of(steps, repeats)


def _learner(path: Path, samples: Sequence[TrainingSample], *overrides: str) -> Callable[[int], object]:
    from learner.engine import LearnerEngine

    learner = LearnerEngine(_config(path, *overrides), path, 0, 1)
    return lambda step: learner.train(samples, step)


def _seconds_of(steps: Mapping[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Of each variant in turn; the first, which allocates, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in range(repeats + 1):
        for name, take in steps.items():
            started = time.perf_counter()
            take(step)
            seconds[name].append(time.perf_counter() - started)
    return {name: of_variant[1:] for name, of_variant in seconds.items()}


def _config(path: Path, *overrides: str) -> RunConfig:
    shared = [f"model.path={path}", "training.prompts_per_step=1", "learner.optimizer.grad_clip=1.0"]
    return resolve_config({}, [*shared, *overrides])


def _bare_loop(path: Path, samples: Sequence[TrainingSample]) -> Callable[[int], object]:
    """Forward, -A log pi of the loss tokens, backward, AdamW: what nobody can leave out."""
    import torch
    from torch.nn import functional as F

    from learner.batches import packed_batch
    from learner.model import load_model, model_inputs
    from learner.packing import pack

    config = _config(path)
    model = load_model(config.model, path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    lengths = [len(sample.token_ids) for sample in samples]
    (microbatches,) = pack(lengths, ranks=1, microbatch_tokens=config.learner.microbatch_tokens)
    batches = [packed_batch(samples, microbatch, torch.device("cpu")) for microbatch in microbatches]
    total = sum(sample.loss_tokens for sample in samples)

    def step(_: int) -> None:
        for batch in batches:
            logits = model(**model_inputs(batch.sequences), logits_to_keep=batch.predicting).logits[0]
            losses = F.cross_entropy(logits.float(), batch.targets, reduction="none") * batch.advantages
            (losses.sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak_bytes(path: Path, variant: str) -> int:
    """Above the loaded model, of one forward and backward pass over a microbatch, in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as told:
        arguments = [str(path), variant, str(_MEMORY_TOKENS), told.name]
        command = [sys.executable, "-m", "benchmarks.learner_memory", *arguments]
        # What is freed goes back to the system at once, so that the peak is what is in use and not how it is scattered.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        subprocess.run(command, env=environment, check=True, timeout=1800)
        return int(told.read())


LEARNER = Case(
    name="learner", about="tokens/s over a bare PyTorch loop, and peak memory over keeping all logits", run=run
)
