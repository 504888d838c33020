"""Warnings with numbers for runs that learn nothing, or worse, and would otherwise look healthy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ray_rl.config.run import RunConfig

Metrics = Mapping[str, float]
Check = Callable[[RunConfig, Metrics, Sequence[Metrics]], str | None]
"""(configuration, metrics of the step, `_TRENDS` of the steps before it, oldest first) -> what is wrong, with the mend."""

_REPEAT_STEPS = 10
_TRENDS = (
    "reward/mean",
    "reward/std",
    "reward/failures",
    "policy/entropy",
    "policy/kl",
    "timing/engines_idle",
    "timing/step",
)
"""Metrics that checks look back at."""

_ALL_TRUNCATED = 0.95
_CONSTANT_STEPS = 5
_FIRST_STEPS = 3
_COLLAPSED_ENTROPY = 0.05
"""Share of the first steps' entropy."""
_KL_LIMIT = 1.0
"""Per token, in nats: the policy then finds most of what the reference writes unlikely."""
_KL_GROWTH = 10.0
_KL_UNREMARKABLE = 0.1
_RATIO_LIMIT = 100.0
_MEAN_RATIO_LIMIT = 0.5
"""Distance of the mean ratio from 1, around which it lies for any two policies that are close."""
_CLIPPED_LIMIT = 0.5
_WINDOW = 5
_RISING_FAILURES = 2.0
_NOTICEABLE_FAILURES = 0.01
_IDLE_STEPS = 3
_IDLE_LIMIT = 0.5


class Health:
    """Looks at every step of a run, and remembers what trends need. After an undo it forgets the steps that are done anew."""

    def __init__(self, config: RunConfig) -> None:
        """Of one sitting: a resumed run's trends begin anew."""
        self._config = config
        self._past: list[tuple[int, Metrics]] = []
        self._found: dict[str, str] = {}
        self._since: dict[str, int] = {}
        self._said: dict[str, int] = {}

    def check(self, step: int, metrics: Metrics) -> list[str]:
        """What is wrong with a step, one line each; what lasts, or comes and goes, is said every 10 steps.

        Args:
            step: its number, one more than the last one's unless steps were undone.
            metrics: by their names in metrics.jsonl; checks whose metrics are missing find nothing.
        """
        while self._past and self._past[-1][0] >= step:
            self._past.pop()
        past = [trends for _, trends in self._past]
        self._found = {name: text for name, look in CHECKS.items() if (text := look(self._config, metrics, past))}
        self._past.append((step, {name: metrics[name] for name in _TRENDS if name in metrics}))
        self._since = {name: min(self._since.get(name, step), step) for name in self._found}
        due = [name for name in self._found if not 0 < step - self._said.get(name, -_REPEAT_STEPS) < _REPEAT_STEPS]
        self._said |= dict.fromkeys(due, step)
        return [self._found[name] + self._duration(name, step) for name in due]

    def metrics(self) -> dict[str, float]:
        """`health/warnings`, how much is wrong with the step checked last, said or not; and 1 or 0 for each check."""
        gauges = {f"health/{name}": float(name in self._found) for name in CHECKS}
        return {"health/warnings": float(len(self._found)), **gauges}

    def _duration(self, name: str, step: int) -> str:
        since = self._since[name]
        return f" (since step {since})" if since < step else ""


def _not_finite(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    names = ("loss/total", "policy/grad_norm", "policy/entropy")
    broken = [f"{name} is {now[name]}" for name in names if not math.isfinite(now.get(name, 0.0))]
    if not broken:
        return None
    return (
        f"{', '.join(broken)}: what is trained from here on is worthless; go on from an earlier checkpoint with a lower "
        f"learner.optimizer.lr (it is {config.learner.optimizer.lr:g}), or with model.dtype=float32"
    )


def _truncated(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    rate = now.get("rollout/truncated_rate", 0.0)
    if rate < _ALL_TRUNCATED:
        return None
    return (
        f"{rate:.0%} of the completions are truncated at rollout.max_tokens = {config.rollout.max_tokens}: raise it; or the "
        "policy never stops, then look at rollout.stop_token_ids and the chat template"
    )


def _decided(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    if now.get("groups/decided_fraction", 0.0) < 1:
        return None
    mean = now.get("reward/mean", 0.0)
    if mean >= 1:
        verdict = "the task is solved or too easy; use harder problems"
    elif mean <= max(0.0, config.reward.unfinished, config.reward.failure):
        verdict = "the task is too hard, or the reward never fires; look at groups.jsonl, use easier problems"
    else:
        verdict = "each problem is solved always or never; use others, or a larger rollout.group_size"
    left = "little" if config.advantage.kind == "vineppo" else "nothing"
    return f"all rewards of every group are equal (mean {mean:.3g}): {left} to learn from; {verdict}"


def _constant(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    recent = [*past, now][-_CONSTANT_STEPS:]
    rewards = {trends.get("reward/mean", math.nan) for trends in recent}
    if len(recent) < _CONSTANT_STEPS or len(rewards) > 1 or any(trends.get("reward/std", 1.0) for trends in recent):
        return None
    return (
        f"every reward of the last {_CONSTANT_STEPS} steps was {rewards.pop():.3g}: the reward does not tell completions "
        "apart; look at groups.jsonl and at reward.kind"
    )


def _zero_gradient(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    if now.get("policy/grad_norm", 1.0) != 0:
        return None
    if skipped := now.get("policy/skipped_minibatches", 0.0):
        reason = f"{skipped:g} minibatches were left out, without loss tokens or past learner.loss.max_mean_ratio"
    else:
        reason = f"{now.get('advantage/fraction_nonzero', 0.0):.0%} of the tokens have an advantage"
    return f"the gradient is 0, so the step taught nothing: {reason}"


def _entropy(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    first = [trends["policy/entropy"] for trends in past if "policy/entropy" in trends][:_FIRST_STEPS]
    entropy = now.get("policy/entropy", math.inf)
    if len(first) < _FIRST_STEPS or entropy >= _COLLAPSED_ENTROPY * (before := statistics.fmean(first)):
        return None
    return (
        f"entropy collapsed: {entropy:.3g} per token, {entropy / before:.1%} of the {before:.3g} of the first steps, so "
        f"little is explored; lower learner.optimizer.lr, raise learner.loss.clip_high (it is "
        f"{config.learner.loss.clip_high:g}), or give learner.kl a coefficient"
    )


def _kl(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    kl = now.get("policy/kl", 0.0)
    before = [trends["policy/kl"] for trends in past[-_REPEAT_STEPS:] if "policy/kl" in trends]
    usual = statistics.median(before) if len(before) >= _WINDOW else math.inf
    if not (kl > _KL_LIMIT or kl > max(_KL_UNREMARKABLE, _KL_GROWTH * usual)):
        return None
    compared = f" (median of the last {len(before)} steps: {usual:.3g})" if math.isfinite(usual) else ""
    return (
        f"the policy runs away from its reference: KL {kl:.3g} per token{compared}; raise learner.kl.coefficient (it is "
        f"{config.learner.kl.coefficient:g}), or lower learner.optimizer.lr"
    )


def _ratio(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    mean, largest = now.get("policy/ratio_mean", 1.0), now.get("policy/ratio_max", 1.0)
    clipped = now.get("policy/clip_fraction", 0.0)
    if not (abs(mean - 1) > _MEAN_RATIO_LIMIT or largest > _RATIO_LIMIT or clipped > _CLIPPED_LIMIT):
        return None
    return (
        f"the policy moves too far within a step: probability ratios up to {largest:.3g}, {mean:.3g} on average, "
        f"{clipped:.0%} of the tokens clipped; lower learner.optimizer.lr, learner.epochs (it is {config.learner.epochs}), "
        "or the number of minibatches"
    )


def _failures(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    share = now.get("reward/failures", 0.0)
    if not share > 0:
        return None
    return (
        f"{share:.2%} of the step's gradings failed (the run stops at {config.reward.max_failure_share:.0%}); "
        "logs/reward-*.log shows the texts"
    )


def _failures_rising(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    shares = [trends.get("reward/failures", 0.0) for trends in (*past, now)][-2 * _WINDOW :]
    if len(shares) < 2 * _WINDOW:
        return None
    before, after = statistics.fmean(shares[:_WINDOW]), statistics.fmean(shares[_WINDOW:])
    if not after > max(_NOTICEABLE_FAILURES, _RISING_FAILURES * before):
        return None
    return (
        f"failed gradings rise: {before:.2%} of all in {_WINDOW} steps, {after:.2%} in the {_WINDOW} after them; the policy "
        "may have found texts that the grader cannot take: mend it, or raise reward.timeout or reward.memory_gib"
    )


def _idle(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    recent = [*past, now][-_IDLE_STEPS:]
    seconds = math.fsum(trends.get("timing/step", 0.0) for trends in recent)
    idle = math.fsum(trends.get("timing/engines_idle", 0.0) for trends in recent)
    staleness = config.training.max_staleness
    if not staleness or len(recent) < _IDLE_STEPS or not idle > _IDLE_LIMIT * seconds:
        return None  # without staleness engines wait for the learner by design
    return (
        f"an engine was idle {idle / seconds:.0%} of the last {_IDLE_STEPS} steps, although training.max_staleness = "
        f"{staleness}: the learner is what the run waits for; use fewer rollout.num_actors and more for the learner, or "
        "larger batches"
    )


def _mismatch(config: RunConfig, now: Metrics, past: Sequence[Metrics]) -> str | None:
    difference, limit = now.get("policy/rollout_train_logprobs_abs_diff_mean", 0.0), config.training.warn_mismatch
    if now.get("staleness/max", 0.0) > 0 or not difference > limit:
        return None  # older samples are expected to differ
    return (
        f"engine and learner differ by {difference:.3g} in a token's log-probability on average (training.warn_mismatch = "
        f"{limit:g}): not on-policy; use model.dtype=float32, or correct for it with learner.loss.importance_cap=2"
    )


CHECKS: dict[str, Check] = {
    "not_finite": _not_finite,
    "truncated": _truncated,
    "decided": _decided,
    "constant_reward": _constant,
    "zero_gradient": _zero_gradient,
    "entropy_collapse": _entropy,
    "kl_explosion": _kl,
    "ratio_explosion": _ratio,
    "reward_failures": _failures,
    "reward_failures_rising": _failures_rising,
    "engine_idle": _idle,
    "mismatch": _mismatch,
}
"""Name of the gauge -> check."""
