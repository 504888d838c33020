"""What a simulation must be told of the hardware, the model and the data: how fast each part is, how long completions get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from ray_rl.config.load import explain, parse_override, text_of, with_value
from ray_rl.config.plain import check_plain, parse_yaml
from ray_rl.config.section import Section
from ray_rl.errors import ConfigError

_MOST_RATE = 1e9
"""Tokens per second. With more, the clock of a simulation cannot tell one token from the next."""


class EngineRates(Section):
    """One inference engine, on the GPUs (or CPUs) of one rollout actor."""

    tokens_per_second: dict[int, float] = Field(min_length=1)
    """Running sequences -> tokens per second of all of them together, for instance {1: 90, 64: 4600, 256: 12000}. In between, the
    seconds of one decoding step are interpolated; below the first, they are the first one's; above the last, the rate is its."""
    prefill_tokens_per_second: float = Field(1e6, gt=0, allow_inf_nan=False)
    """Prompt tokens per second. Each group's prompt is computed once; continuations find their prefix in the cache."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of the engine that was measured; only recipes with the same can be planned."""
    group_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of each group besides its tokens: the call to the actor, its queue, the record."""

    @field_validator("tokens_per_second")
    @classmethod
    def _grow(cls, given: dict[int, float]) -> dict[int, float]:
        ordered = dict(sorted(given.items()))
        if min(ordered) < 1 or min(ordered.values()) <= 0:
            raise ValueError("numbers of sequences and rates are greater than 0")
        if not all(rate <= _MOST_RATE for rate in ordered.values()):
            raise ValueError(f"rates are numbers of at most {_MOST_RATE:g}")
        if sorted(ordered.values()) != list(ordered.values()):
            raise ValueError("more sequences must not be slower together; leave out what was measured badly")
        return ordered


class LearnerRates(Section):
    """The learner's ranks."""

    tokens_per_second: float = Field(gt=0, allow_inf_nan=False)
    """Of one rank: tokens of the batch (completions, prompts once a group, continuations where they train), each as often as
    there are epochs, from the groups to the updated weights."""
    fixed_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of each optimizer step, however many tokens and ranks: the collectives, the update."""


class SyncRates(Section):
    """The way of new weights to the engines. Engines sample nothing meanwhile."""

    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of each publication."""
    seconds_per_gb: float = Field(0.0, ge=0, allow_inf_nan=False)
    """More for each 10^9 bytes of weights."""
    weights_gb: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the policy, in 10^9 bytes."""
    seconds_per_engine: float = Field(0.0, ge=0, allow_inf_nan=False)
    """More for each engine but the first, where they get the weights one after the other."""

    def total(self, engines: int) -> float:
        """Seconds of a publication to so many."""
        return self.seconds + self.seconds_per_gb * self.weights_gb + self.seconds_per_engine * (engines - 1)


class Lengths(Section):
    """Tokens of completions. What exceeds rollout.max_tokens is cut there."""

    mean: float = Field(256.0, ge=1, le=1e9)
    """Before they are cut."""
    cv: float = Field(0.5, ge=0, le=100)
    """Standard deviation over the mean, of a log-normal distribution. 0: all are equal."""
    measured: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Lengths of completions that were sampled, instead of `mean` and `cv`: each is as likely as any other."""
    prompt: float = Field(100.0, ge=0, allow_inf_nan=False)
    """Tokens of a prompt."""


class ContinuationRates(Section):
    """What state values cost; unused with values.kind=none."""

    per_completion: float = Field(8.0, ge=0, le=10_000)
    """Continuations for each completion, on average."""
    tokens_ratio: float = Field(1.0, ge=0, le=1e6)
    """Tokens of all continuations over those of all completions."""


class Rates(Section):
    """All of it. From a file, from runs (`--from RUN`), from overrides (`--rate engine.group_seconds=0.1`)."""

    about: str = ""
    """What was measured, where, by whom; printed above the plan."""
    engine: EngineRates
    learner: LearnerRates
    sync: SyncRates = SyncRates()
    lengths: Lengths = Lengths()
    continuations: ContinuationRates = ContinuationRates()
    reward_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    """From the end of completions to their rewards."""
    decided_share: float = Field(0.0, ge=0, le=1)
    """Of the groups, those whose rewards are all equal (training.decided_groups)."""
    driver_seconds_per_group: float = Field(0.0005, ge=0, allow_inf_nan=False)
    """Of the one process that leads the run; the default was measured by `ray-rl bench scale` on a core of an AMD EPYC. It
    delays nothing in the simulation; a plan says what share of a core it is."""


def read_rates(path: Path) -> dict[str, Any]:
    """The sections of a rates file, or of the result of `ray-rl bench plan --json`.

    Raises:
        ConfigError: unreadable, or neither.
    """
    data = parse_yaml(text_of(path, "rates file"), f"{path}:")
    cases = data.get("cases") if isinstance(data, dict) else None
    if isinstance(cases, dict):
        data = cases["plan"].get("details", {}).get("rates") if isinstance(cases.get("plan"), dict) else None
        if data is None:
            raise ConfigError(f"{path}: has no result of the case plan; measure it: ray-rl bench plan --json FILE")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: rates are a mapping of sections, not a {type(data).__name__}")
    return data


def resolve_rates(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Rates:
    """Check the sections after applying overrides of the form `engine.group_seconds=0.1`.

    Raises:
        ConfigError: unknown keys, wrong values, something missing; one line each.
    """
    merged = dict(data)
    for override in overrides:
        path, value = parse_override(override)
        merged = with_value(merged, path, value)
    plain = _with_text_keys(merged)
    check_plain(plain)
    try:
        return Rates.model_validate(plain)
    except ValidationError as error:
        lines = explain(error, f"unknown key; sections are {', '.join(Rates.model_fields)}")
        raise ConfigError("\n".join(f"rates: {line}" for line in lines)) from error


def _with_text_keys(value: Any) -> Any:
    """YAML reads the numbers of sequences as numbers; the checks of what a user wrote know text only."""
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, int) else key: _with_text_keys(inner) for key, inner in value.items()}
    return value
