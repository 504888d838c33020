"""Warnings for runs that learn nothing and would otherwise look healthy."""

from __future__ import annotations

from collections.abc import Mapping


def warnings_of(metrics: Mapping[str, float]) -> list[str]:
    """What is wrong with a step, one line each; empty when nothing is.

    Args:
        metrics: of one step, by their names in metrics.jsonl.
    """
    found: list[str] = []
    if metrics.get("rollout/truncated_rate", 0.0) >= 0.95:
        found.append("nearly every completion is truncated: raise rollout.max_tokens, or the policy never stops")
    if metrics.get("groups/decided_fraction", 0.0) >= 1.0:
        mean = metrics.get("reward/mean", 0.0)
        verdict = "the task is too hard, or the reward never fires" if mean <= 0 else "the task is solved or too easy"
        found.append(f"all rewards of every group are equal (mean {mean:.3g}): nothing to learn from; {verdict}")
    if metrics.get("policy/grad_norm", 1.0) == 0.0:
        found.append("the gradient is zero: every advantage vanished")
    difference = metrics.get("policy/rollout_train_logprobs_abs_diff_mean", 0.0)
    if difference > 0.1:
        found.append(f"engine and learner disagree on log-probabilities by {difference:.2g} on average: not on-policy")
    return found
