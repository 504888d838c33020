"""How noisy the policy gradient is under each estimator: the trace of its covariance over repeated batches of one policy.

Beside it stands the proxy sum_k E[A_k^2] (shared formulas of VinePPO, arXiv 2410.01679): measured, and as the binomial
law predicts it for K continuations of states with values p: Var(R) + (1/K) sum_k E[p_k (1 - p_k) + p_{k+1} (1 - p_{k+1})];
for an advantage that is broadcast to n segments, n Var(R).
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.bank import Bank
from benchmarks.subject import subject_of
from benchmarks.suite import Case, CaseResult, Options
from ray_rl.config import RunConfig, load_config
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.types import TrajectoryGroup

_VALUES: Mapping[str, FixedValues | AdaptiveValues] = {
    "fixed K=9": FixedValues(num_continuations=9),
    "fixed K=3": FixedValues(num_continuations=3),
    "fixed K=1": FixedValues(num_continuations=1),
    "fixed K=1 backup": FixedValues(num_continuations=1, pooling="backup"),
    "adaptive": AdaptiveValues(),
    "adaptive unbiased": AdaptiveValues(max_bias=0),
}
_BROADCAST = {"grpo (R - mean) / std": "grpo", "broadcast R - mean of others": "rloo"}
_TRUTH = FixedValues(num_continuations=9, pooling="backup")
"""The closest to true values that the benchmark's own continuations give."""
_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The groups of one batch, the same completions under every estimator."""

    groups: Mapping[str, Sequence[TrajectoryGroup]]
    truth: Sequence[TrajectoryGroup]


def run(options: Options) -> CaseResult:
    """Batches of fresh prompts and completions; each estimator values the same ones."""
    count = 6 if options.quick else 24
    config = load_config("laptop-vineppo", ["evaluation.problems=1", "rollout.cpus_per_actor=2"])
    batches = asyncio.run(_sample(config, count))
    gradients = _Gradients(config)
    rows, noise_of = [], {}
    for name in (*_BROADCAST, *_VALUES):
        values = _VALUES.get(name)
        kind = _BROADCAST.get(name, "vineppo")
        of_batches = [gradients.of(batch.groups[name if values else "fixed K=9"], kind) for batch in batches]
        noise, signal = noise_and_signal(of_batches)
        noise_of[name] = noise
        rows.append(
            {
                "estimator": name,
                "trace of covariance x 1000": 1000 * noise,
                "squared mean x 1000": 1000 * signal,
                "noise / signal": noise / signal if signal > 0 else math.nan,
                "proxy": statistics.fmean(_proxy(batch, name, kind) for batch in batches),
                "predicted": statistics.fmean(_predicted(batch, values, kind) for batch in batches),
            }
        )
    headline = {
        "adaptive_over_broadcast": noise_of["adaptive"] / noise_of["broadcast R - mean of others"],
        "adaptive_over_fixed_9": noise_of["adaptive"] / noise_of["fixed K=9"],
    }
    return CaseResult(headline=headline, rows=rows, details={"batches": count, "prompts": _PROMPTS})


async def _sample(config: RunConfig, count: int) -> list[_Batch]:
    async with subject_of(config, seed=2) as subject:

        async def group() -> dict[str, TrajectoryGroup]:
            first, bank = await subject.group(subject.next_prompt()), Bank(subject.engine)
            return {
                name: await subject.valued(first, values, bank.reader())
                for name, values in {**_VALUES, "truth": _TRUTH}.items()
            }

        async def batch() -> _Batch:
            groups = await asyncio.gather(*(group() for _ in range(_PROMPTS)))
            by_name = {name: [of_prompt[name] for of_prompt in groups] for name in groups[0]}
            return _Batch(truth=by_name.pop("truth"), groups=by_name)

        return await asyncio.gather(*(batch() for _ in range(count)))


class _Gradients:
    """Of the surrogate loss of a batch at the policy that sampled it, without clipping the norm."""

    def __init__(self, config: RunConfig) -> None:
        from learner.model import load_model
        from ray_rl.launch import model_source

        self._config = config
        self._model = load_model(config.model, model_source(config))

    def of(self, groups: Sequence[TrajectoryGroup], kind: str) -> Any:
        """Flat gradient [parameters] of one batch under an advantage."""
        import torch

        from learner.batches import loss_totals, tensor_batch
        from learner.losses import token_mean
        from learner.model import token_logprobs_and_entropy
        from learner.samples import training_samples
        from ray_rl.config import resolve_config
        from ray_rl.types import Microbatch

        sections = self._config.model_dump(mode="json")
        config = resolve_config(sections | {"advantage": {"kind": kind}} | ({} if kind == "vineppo" else _NO_VALUES))
        samples = [sample for group in groups for sample in training_samples(group, config)]
        batch = tensor_batch(samples, Microbatch(indices=tuple(range(len(samples)))), torch.device("cpu"))
        logprobs, _ = token_logprobs_and_entropy(self._model, batch.input_ids, batch.attention_mask, 1.0)
        totals = loss_totals(samples, max_tokens=config.rollout.max_tokens)
        loss = token_mean(-logprobs * batch.advantages, batch.loss_mask, batch.weights, totals)
        self._model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in self._model.parameters()])


_NO_VALUES = {"values": {"kind": "none"}}


def noise_and_signal(gradients: Sequence[Any]) -> tuple[float, float]:
    """Trace of the covariance of one batch's gradient, and the squared norm of the mean gradient, both unbiased.

    Args:
        gradients: [batches] tensors [parameters], independent.
    """
    import torch

    stacked = torch.stack(list(gradients)).double()
    mean = stacked.mean(dim=0)
    noise = float(((stacked - mean) ** 2).sum() / (len(stacked) - 1))
    return noise, float((mean**2).sum()) - noise / len(stacked)


def _proxy(batch: _Batch, name: str, kind: str) -> float:
    """Mean over completions of sum_k A_k^2, as measured."""
    from learner.advantages import ADVANTAGES

    sums = []
    for group in batch.groups.get(name, batch.groups["fixed K=9"]):
        for trajectory, of_tokens in zip(group.trajectories, ADVANTAGES[kind](group), strict=True):
            assert of_tokens is not None, "the rewards of a benchmark never fail"
            sums.append(math.fsum(of_tokens[start] ** 2 for start in trajectory.boundaries[:-1]))
    return statistics.fmean(sums)


def _predicted(batch: _Batch, values: FixedValues | AdaptiveValues | None, kind: str) -> float:
    """The same by the law of the binomial; nan where it does not say."""
    if kind == "grpo" or isinstance(values, AdaptiveValues) or (values and values.pooling != "none"):
        return math.nan
    found = []
    for group in batch.truth:
        start = statistics.fmean(trajectory.values[0].mean for trajectory in group.trajectories)
        variance = start * (1 - start)
        for trajectory in group.trajectories:
            spreads = [value.mean * (1 - value.mean) for value in trajectory.values]
            if values is None:
                found.append(len(spreads) * variance)
            else:
                found.append(variance + sum(a + b for a, b in pairwise([*spreads, 0.0])) / values.num_continuations)
    return statistics.fmean(found)


GRADIENT = Case(name="gradient", about="trace of the gradient's covariance under each estimator", run=run)
