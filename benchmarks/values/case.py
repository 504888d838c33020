"""Error, bias, tokens and time of the value estimators, at a fixed policy, against an independent reference."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.bank import Bank
from benchmarks.subject import subject_of
from benchmarks.suite import Case, CaseResult, Options
from benchmarks.values.errors import PromptErrors, mean_and_ci95, pooled_rmse, price_at, rmse
from benchmarks.values.judged import JudgedGroup, Valued, judged_groups, value
from benchmarks.values.plot import plot
from benchmarks.values.policies import Policy, policies
from ray_rl.config.values import AdaptiveValues, FixedValues

YARDSTICK = "fixed K=9"
_FIXED = {
    f"fixed K={k}{label}": FixedValues(num_continuations=k, pooling=pooling)
    for pooling, label in (("none", ""), ("passing", " passing"), ("backup", " backup"))
    for k in (1, 3, 5, 9)
}
_UNBIASED = {
    f"adaptive unbiased K={k}": AdaptiveValues(num_continuations=k, max_bias=0, token_budget=100)
    for k in (1, 2, 3, 4, 6)
}
_ADAPTIVE = {f"adaptive K={k}": AdaptiveValues(num_continuations=k, token_budget=100) for k in (1, 2, 3, 4, 6)}
_UNPOOLED = {
    f"adaptive unpooled K={k}": AdaptiveValues(num_continuations=k, pooling="none", token_budget=100) for k in (3,)
}
DEFAULT = f"adaptive K={AdaptiveValues().num_continuations}"
ESTIMATORS: Mapping[str, FixedValues | AdaptiveValues] = {**_FIXED, **_UNPOOLED, **_UNBIASED, **_ADAPTIVE}
_TIMED = (YARDSTICK, *_ADAPTIVE)
_FAMILIES = {
    "fixed K (VinePPO)": [name for name in _FIXED if name.endswith(("1", "3", "5", "9"))],
    "fixed K, passing": [name for name in _FIXED if name.endswith("passing")],
    "fixed K, backup": [name for name in _FIXED if name.endswith("backup")],
    "adaptive, unbiased": list(_UNBIASED),
    "adaptive": list(_ADAPTIVE),
}
"""What is drawn as a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Of one policy: what every estimator made of its prompts."""

    groups: Sequence[JudgedGroup]
    valued: Mapping[str, Sequence[Valued]]
    """[repeats] each."""
    seconds: Mapping[str, float]
    """Of those that were timed, on the timed prompts."""
    spent: Mapping[str, float]
    """Tokens and seconds of the benchmark itself."""


def run(options: Options) -> CaseResult:
    """Each policy in its own engine: groups, reference, every estimator on the same draws, then the clock."""
    headline, rows, details = {}, [], {}
    drawn: dict[str, dict[str, dict[str, float]]] = {}
    for policy in policies(options.work, quick=options.quick):
        found = asyncio.run(_measure(policy))
        summary = {population: _summaries(found, chosen) for population, chosen in _POPULATIONS.items()}
        headline[policy.name] = _headline(policy, summary["undecided"])
        rows += [
            {"policy": policy.name, "estimator": name, **{key: summary["undecided"][name][key] for key in _COLUMNS}}
            for name in ESTIMATORS
        ]
        details[policy.name] = {**summary, "spent": found.spent, "plan": _plan(policy)}
        drawn[policy.name] = {name: {**of, "compared": of[policy.error]} for name, of in summary["undecided"].items()}
        # After each policy, for a case that is stopped amid the next one.
        (options.work / f"values-{policy.name}.json").write_text(json.dumps(details[policy.name], indent=1) + "\n")
    plot(drawn, _FAMILIES, options.work / "values.png")
    return CaseResult(headline=headline, rows=rows, details=details)


_COLUMNS = ("k tokens", "error", "pooled", "error of V", "bias", "to outcome", "ranked")
_POPULATIONS: Mapping[str, Callable[[JudgedGroup], bool]] = {
    "undecided": lambda judged: judged.reference.undecided,
    "all": lambda judged: True,
}


def _plan(policy: Policy) -> dict[str, Any]:
    plan = asdict(policy)
    return plan | {"config": policy.config.model_dump(mode="json")}


async def _measure(policy: Policy) -> _Found:
    async with subject_of(policy.config, seed=1) as subject:
        started = time.perf_counter()
        groups, reference_tokens = await judged_groups(
            subject, policy.prompts, judged=policy.judged, samples=policy.reference
        )
        referenced = time.perf_counter()
        valued: dict[str, list[Valued]] = {name: [] for name in ESTIMATORS}
        drawn = 0
        for _ in range(policy.repeats):
            bank = Bank(subject.engine)
            for name, values in ESTIMATORS.items():
                valued[name].append(await value(subject, values, groups, bank.reader()))
            drawn += bank.tokens
        timed_from = time.perf_counter()
        seconds = dict.fromkeys(_TIMED, 0.0)
        # One after the other, in every repeat: a drift of the machine falls on all of them.
        for name in _TIMED * policy.repeats:
            timed = await value(subject, ESTIMATORS[name], groups[: policy.timed])
            seconds[name] += timed.seconds / policy.repeats
    spent = {
        "reference tokens": float(reference_tokens),
        "reference seconds": referenced - started,
        "drawn tokens": float(drawn),
        "drawn seconds": timed_from - referenced,
        "timing seconds": time.perf_counter() - timed_from,
    }
    return _Found(groups=groups, valued=valued, seconds=seconds, spent=spent)


def _summaries(found: _Found, chosen: Callable[[JudgedGroup], bool]) -> dict[str, dict[str, float]]:
    """Estimator -> its numbers on the chosen prompts, all repeats together."""
    indices = [index for index, judged in enumerate(found.groups) if chosen(judged)]
    return {
        name: _summary(
            [[valued.errors[index] for index in indices] for valued in repeats],
            tokens=sum(valued.tokens[index] for valued in repeats for index in indices) / len(repeats),
            primary=sum(found.groups[index].group.cost.primary_tokens for index in indices),
            seconds=found.seconds.get(name),
        )
        for name, repeats in found.valued.items()
    }


def _summary(
    repeats: Sequence[Sequence[PromptErrors]], *, tokens: float, primary: int, seconds: float | None
) -> dict[str, float]:
    errors = [error for repeat in repeats for error in repeat]
    # A prompt's repeats share its reference, so a prompt is what is independent.
    bias, (low, high) = mean_and_ci95([_mean_of(of_prompt, "bias") for of_prompt in zip(*repeats, strict=True)])
    to_outcome, (to_low, to_high) = mean_and_ci95(
        [_mean_of(of_prompt, "bias_to_outcome") for of_prompt in zip(*repeats, strict=True)]
    )
    return {
        "prompts": float(len(repeats[0])),
        "k tokens": tokens / 1000,
        "tokens over primary": tokens / primary,
        "error": rmse([error.advantage for error in errors]),
        "pooled": pooled_rmse([error.advantage for error in errors]),
        "error of V": pooled_rmse([error.value for error in errors]),
        "bias": bias,
        "bias low": low,
        "bias high": high,
        "to outcome": to_outcome,
        "to outcome low": to_low,
        "to outcome high": to_high,
        "ranked": mean_and_ci95([error.ranked for error in errors])[0],
    } | ({} if seconds is None else {"seconds": seconds})


def _mean_of(errors: Sequence[PromptErrors], name: str) -> float:
    return sum(getattr(error, name) for error in errors) / len(errors)


def _headline(policy: Policy, summary: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Price of the adaptive estimator at the yardstick's error, over the yardstick's; its bias at the default K."""
    yardstick, by = summary[YARDSTICK], policy.error
    points, unbiased = ([summary[name] for name in family] for family in (_ADAPTIVE, _UNBIASED))

    def ratio(of: Sequence[Mapping[str, float]], price: str, error: str) -> float:
        return price_at(yardstick[error], of, price=price, by=error) / yardstick[price]

    default = summary[DEFAULT]
    return {
        "equal_error_token_ratio": ratio(points, "k tokens", by),
        "equal_error_time_ratio": ratio(points, "seconds", by),
        "equal_error_token_ratio_unbiased": ratio(unbiased, "k tokens", by),
        "equal_error_token_ratio_other_error": ratio(points, "k tokens", "pooled" if by == "error" else "error"),
        "bias": default["bias"],
        "bias_ci95": [default["bias low"], default["bias high"]],
        "bias_to_outcome": default["to outcome"],
        "bias_to_outcome_ci95": [default["to outcome low"], default["to outcome high"]],
        "undecided_prompts": default["prompts"],
    }


VALUES = Case(name="values", about="error, bias and price of state values against an independent reference", run=run)
