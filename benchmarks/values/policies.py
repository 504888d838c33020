"""The policies whose state values are estimated, and how much is spent on the reference of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fetch_smollm2 import ensure
from ray_rl.config import RunConfig, load_config

SMOLLM2_RECIPE = Path(__file__).parent / "smollm2-sums.yaml"
_SEED = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One subject of the comparison."""

    name: str
    config: RunConfig
    prompts: int
    """Enough that at least 60 of them are undecided."""
    judged: int
    """Completions of each group that the reference covers."""
    reference: int
    """Continuations per state that the reference is made of."""
    repeats: int
    """Independent draws that every estimator sees, and runs of those that are timed."""
    timed: int
    """Prompts on which the estimators are timed."""
    error: str
    """Which error is compared: `error`, the root mean squared one of each prompt, averaged; or `pooled`, the root of the
    mean over prompts, where the reference is too noisy for a single prompt."""


def policies(work: Path, *, quick: bool) -> Sequence[Policy]:
    """The embedded policy, and SmolLM2-135M, which is fetched into the work folder if it is not there."""
    smollm2 = ensure(work)
    # Prompts of a seed of their own: no estimator was designed on them.
    shared = ["evaluation.problems=1", "rollout.cpus_per_actor=2", f"seed={_SEED}"]
    embedded = load_config("laptop-vineppo", shared)
    sums = load_config(str(SMOLLM2_RECIPE), [*shared, f"model.path={smollm2}"])
    if quick:
        return (
            Policy(
                name="embedded", config=embedded, prompts=16, judged=4, reference=64, repeats=1, timed=16, error="error"
            ),
            Policy(name="smollm2", config=sums, prompts=12, judged=3, reference=8, repeats=1, timed=4, error="pooled"),
        )
    return (
        Policy(
            name="embedded", config=embedded, prompts=64, judged=2, reference=256, repeats=1, timed=64, error="error"
        ),
        Policy(name="smollm2", config=sums, prompts=92, judged=1, reference=16, repeats=1, timed=8, error="pooled"),
    )
