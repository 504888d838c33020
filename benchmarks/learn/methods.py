"""The methods that are compared, as what each overrides in `chains.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GRPO = "grpo"
"""Whose best accuracy the others are measured by."""

METHODS: Mapping[str, Sequence[str]] = {
    GRPO: (),
    # Only tokens that the policy was unsure of train (SPO, arXiv 2505.23564).
    "grpo masked": ("learner.loss.confident_above=0.9",),
    # About as many tokens a step as the adaptive VinePPO samples, spent on larger groups and on other prompts in the place
    # of decided ones (DAPO, arXiv 2503.14476).
    "grpo more tokens": ("rollout.group_size=12", "training.decided_groups=refill"),
    # The published method (arXiv 2410.01679).
    "vineppo K=9": ("advantage.kind=vineppo", "values={kind: fixed, num_continuations: 9}"),
    "vineppo K=3": ("advantage.kind=vineppo", "values={kind: fixed, num_continuations: 3}"),
    "vineppo adaptive": ("advantage.kind=vineppo", "values={kind: adaptive}"),
    # Groups whose rewards are all equal get values, too.
    "adaptive unbiased": ("advantage.kind=vineppo", "values={kind: adaptive, max_bias: 0}"),
    # The adaptive estimator spends nothing on decided groups; others take their place.
    "adaptive refilled": ("advantage.kind=vineppo", "values={kind: adaptive}", "training.decided_groups=refill"),
    # As the recipes have it.
    "adaptive smoothed refilled": (
        "advantage={kind: vineppo, gae_lambda: 0.3, baseline_smoothing: 0.5}",
        "values={kind: adaptive}",
        "training.decided_groups=refill",
    ),
    "adaptive trained": ("advantage.kind=vineppo", "values={kind: adaptive, train_on_continuations: true}"),
}
"""Name -> overrides."""
