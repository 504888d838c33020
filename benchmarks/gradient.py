"""How noisy the policy gradient is under each advantage, and how much of the noise comes from estimating values.

Groups are independent, so the trace of the covariance of a batch's gradient is that of one group's, times their number. Of
each group the gradient of every segment's log-probability is taken once; what an advantage makes of them is then a sum. All
advantages see the same completions. An estimator values them twice, with other continuations each time: half the squared
difference is the noise that these add. What exact values would leave is the product of both, for an unbiased estimator.
Few groups, those where something unlikely was sampled, make most of a trace: hence many groups, and intervals.

Beside it stands the proxy sum_k E[A_k^2] (shared formulas of VinePPO, arXiv 2410.01679): measured, and as the binomial
law predicts it for K continuations of states with values p: Var(R) + (1/K) sum_k E[p_k (1 - p_k) + p_{k+1} (1 - p_{k+1})];
for an advantage that is broadcast to n segments, n Var(R).
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.bank import Bank
from benchmarks.subject import Subject, subject_of
from benchmarks.suite import Case, CaseResult, Options
from ray_rl.config import RunConfig, load_config
from ray_rl.config.advantage import AdvantageConfig, GrpoAdvantage, RlooAdvantage, VineppoAdvantage
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.types import TrajectoryGroup

if TYPE_CHECKING:
    import torch

Values = FixedValues | AdaptiveValues
_SMOOTHED = VineppoAdvantage(gae_lambda=0.3, baseline_smoothing=0.5)
_SEED = 13
"""Of prompts on which nothing was designed."""
_RESAMPLES = 2000
_BROADCAST = "broadcast R - mean of others"
_EXACT = "exact values"
_REFERENCE = "fixed K=9 backup"
"""Whose two valuations the exact ones are told from: unbiased, and the least noisy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Method:
    """An advantage, and the values it takes."""

    advantage: AdvantageConfig
    values: Values | None = None


_VALUES: Mapping[str, Values] = {
    "fixed K=9": FixedValues(num_continuations=9),
    _REFERENCE: FixedValues(num_continuations=9, pooling="backup"),
    "fixed K=3": FixedValues(num_continuations=3),
    "fixed K=3 backup": FixedValues(num_continuations=3, pooling="backup"),
    "fixed K=1": FixedValues(num_continuations=1),
    "fixed K=1 backup": FixedValues(num_continuations=1, pooling="backup"),
    "adaptive": AdaptiveValues(),
    "adaptive unbiased": AdaptiveValues(max_bias=0),
}
_METHODS: Mapping[str, _Method] = {
    "grpo (R - mean) / std": _Method(advantage=GrpoAdvantage()),
    _BROADCAST: _Method(advantage=RlooAdvantage()),
    **{
        name: _Method(advantage=advantage, values=values)
        for name, values in _VALUES.items()
        for name, advantage in ((name, VineppoAdvantage()), (f"{name} smoothed", _SMOOTHED))
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Valued:
    """The same completions of one prompt, valued again and again; each pair by independent continuations."""

    completions: TrajectoryGroup
    pairs: Mapping[Values, tuple[TrajectoryGroup, TrajectoryGroup]]

    def seen_by(self, method: _Method) -> tuple[TrajectoryGroup, TrajectoryGroup]:
        """What a method takes its advantages from, twice."""
        return self.pairs[method.values] if method.values else (self.completions, self.completions)


def run(options: Options) -> CaseResult:
    """Fresh prompts and completions; each estimator values the same ones."""
    count = 24 if options.quick else 192
    config = load_config("laptop-vineppo", ["evaluation.problems=1", "rollout.cpus_per_actor=2", f"seed={_SEED}"])
    groups = asyncio.run(_sample(config, count))
    found = _moments(groups, config)
    broadcast, exact = found[_BROADCAST], found[_REFERENCE].crossed_trace
    rows = []
    for name, method in _METHODS.items():
        moments = found[name]
        low, high = moments.over(broadcast)
        rows.append(
            {
                "advantage": name,
                "continuation tokens": _tokens(groups, method),
                "trace over broadcast": moments.trace / broadcast.trace,
                "from": low,
                "to": high,
                "of it from continuations": moments.added / broadcast.trace,
                "trace over squared mean": moments.noise_over_signal,
                "proxy": _proxy(groups, method),
                "predicted": _predicted(groups, method),
            }
        )
    of_exact = {"advantage": _EXACT, "trace over broadcast": exact / broadcast.trace, "of it from continuations": 0.0}
    rows.append(dict.fromkeys(rows[0], math.nan) | of_exact)
    headline = {
        "adaptive_over_broadcast": found["adaptive"].trace / broadcast.trace,
        "adaptive_smoothed_over_broadcast": found["adaptive smoothed"].trace / broadcast.trace,
        "adaptive_smoothed_over_fixed_9": found["adaptive smoothed"].trace / found["fixed K=9"].trace,
        "exact_over_broadcast": exact / broadcast.trace,
    }
    details = {
        "groups": count,
        "trace of broadcast": broadcast.trace,
        "squares": {name: moments.squares for name, moments in found.items()},
    }
    return CaseResult(headline=headline, rows=rows, details=details)


def _moments(groups: Sequence[_Valued], config: RunConfig) -> dict[str, Moments]:
    import torch

    scores = _Scores(config)
    found = {name: Moments() for name in _METHODS}
    for group in groups:
        weights = [_per_segment(of, m.advantage) for m in _METHODS.values() for of in group.seen_by(m)]
        gradients = torch.tensor(weights) @ scores.of(group.completions)
        for moments, pair in zip(found.values(), gradients.view(len(found), 2, -1), strict=True):
            moments.add(*pair)
    return found


async def _sample(config: RunConfig, count: int) -> list[_Valued]:
    async with subject_of(config, seed=2) as subject:
        # A few prompts at a time: one group's rounds wait for each other, so several keep the engine's batch full.
        at_once = asyncio.Semaphore(8)

        async def one() -> _Valued:
            async with at_once:
                return await _value(subject)

        return await asyncio.gather(*(one() for _ in range(count)))


async def _value(subject: Subject) -> _Valued:
    completions = await subject.group(subject.next_prompt())
    banks = Bank(subject.engine), Bank(subject.engine)
    first, second = [
        {values: await subject.valued(completions, values, bank.reader()) for values in _VALUES.values()}
        for bank in banks
    ]
    return _Valued(completions=completions, pairs={values: (first[values], second[values]) for values in first})


class _Scores:
    """Gradients of the segments' log-probabilities at the policy that sampled them."""

    def __init__(self, config: RunConfig) -> None:
        from learner.model import Policy, load_model
        from ray_rl.launch import model_source

        self._policy = Policy(load_model(config.model, model_source(config)))

    def of(self, group: TrajectoryGroup) -> torch.Tensor:
        """[segments of all completions, parameters]."""
        import torch

        from learner.batches import pack_sequences

        parameters = list(self._policy.parameters())
        rows = []
        for trajectory in group.trajectories:
            prompt, completion = group.prompt.token_ids, trajectory.completion.token_ids
            sequences = pack_sequences([prompt + completion], torch.device("cpu"))
            predicting = torch.arange(len(completion)) + len(prompt) - 1
            of_completion, _ = self._policy(sequences, predicting, torch.tensor(completion), 1.0)
            for start, end in pairwise(trajectory.boundaries):
                of_segment = torch.autograd.grad(of_completion[start:end].sum(), parameters, retain_graph=True)
                rows.append(torch.cat([gradient.flatten() for gradient in of_segment]))
        return torch.stack(rows)


def _per_segment(group: TrajectoryGroup, advantage: AdvantageConfig) -> list[float]:
    """[segments of all completions] the advantage of each."""
    from learner.advantages import token_advantages

    found = []
    for trajectory, of_tokens in zip(group.trajectories, token_advantages(group, advantage), strict=True):
        assert of_tokens is not None, "the rewards of a benchmark never fail"
        found += [of_tokens[start] for start in trajectory.boundaries[:-1]]
    return found


class Moments:
    """Of one advantage's gradient over groups, each seen with two independent valuations."""

    def __init__(self) -> None:
        self.squares: list[float] = []
        """[groups] squared length, mean of the two."""
        self._differences: list[float] = []
        self._products: list[float] = []
        self._sum: Any = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """One group's gradient [parameters], twice."""
        self.squares.append(float((a @ a + b @ b) / 2))
        self._differences.append(float((a - b) @ (a - b) / 2))
        self._products.append(float(a @ b))
        self._sum = self._sum + (a + b).double() / 2

    @property
    def added(self) -> float:
        """Variance given the completions."""
        return statistics.fmean(self._differences)

    @property
    def squared_mean(self) -> float:
        """Squared length of the mean gradient, unbiased: a group meets the others only, never itself."""
        count = len(self.squares)
        with_itself = math.fsum(self.squares) - math.fsum(self._differences) / 2
        return (float(self._sum @ self._sum) - with_itself) / (count * (count - 1))

    @property
    def trace(self) -> float:
        """Of the covariance of one group's gradient."""
        return statistics.fmean(self.squares) - self.squared_mean

    @property
    def crossed_trace(self) -> float:
        """The same without what the valuations add."""
        return statistics.fmean(self._products) - self.squared_mean

    @property
    def noise_over_signal(self) -> float:
        """Trace over squared mean; nan where the groups are too few to tell the mean from 0."""
        signal = self.squared_mean
        return self.trace / signal if signal > 0 else math.nan

    def over(self, other: Moments) -> tuple[float, float]:
        """95 % of the ratio of two mean squares over resampled groups."""
        draw = random.Random(0)
        pairs, ratios = list(zip(self.squares, other.squares, strict=True)), []
        for _ in range(_RESAMPLES):
            chosen = draw.choices(pairs, k=len(pairs))
            ratios.append(math.fsum(a for a, _ in chosen) / math.fsum(b for _, b in chosen))
        cuts = statistics.quantiles(ratios, n=40)
        return cuts[0], cuts[-1]


def _tokens(groups: Sequence[_Valued], method: _Method) -> float:
    """Of continuations, per token of a completion."""
    if method.values is None:
        return 0.0
    costs = [group.cost for valued in groups for group in valued.pairs[method.values]]
    return sum(cost.continuation_tokens for cost in costs) / sum(cost.primary_tokens for cost in costs)


def _proxy(groups: Sequence[_Valued], method: _Method) -> float:
    """Mean over completions of sum_k A_k^2, as measured."""
    sums = []
    for valued in groups:
        of = valued.seen_by(method)[0]
        sums.append(math.fsum(a * a for a in _per_segment(of, method.advantage)) / len(of.trajectories))
    return statistics.fmean(sums)


def _predicted(groups: Sequence[_Valued], method: _Method) -> float:
    """The same by the law of the binomial; nan where it does not say."""
    plain = isinstance(method.values, FixedValues) and method.values.pooling == "none"
    if not (isinstance(method.advantage, RlooAdvantage) or (plain and method.advantage == VineppoAdvantage())):
        return math.nan
    found = []
    for group in (valued.seen_by(_METHODS[_REFERENCE])[0] for valued in groups):
        start = statistics.fmean(trajectory.values[0].mean for trajectory in group.trajectories)
        variance = start * (1 - start)
        for trajectory in group.trajectories:
            spreads = [value.mean * (1 - value.mean) for value in trajectory.values]
            if method.values is None:
                found.append(len(spreads) * variance)
            else:
                found.append(
                    variance + sum(a + b for a, b in pairwise([*spreads, 0.0])) / method.values.num_continuations
                )
    return statistics.fmean(found)


GRADIENT = Case(name="gradient", about="trace of the gradient's covariance under each advantage", run=run)
