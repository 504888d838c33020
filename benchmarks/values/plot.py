"""Error of the advantages against tokens, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite import pyplot_without_screen


def plot(
    summaries: Mapping[str, Mapping[str, Mapping[str, float]]], families: Mapping[str, Sequence[str]], file: Path
) -> None:
    """One panel a policy, one line a family of estimators.

    Args:
        summaries: policy -> estimator -> its numbers on undecided prompts, and the key of the error under `compared`.
        families: label -> estimators, from cheap to dear.
        file: PNG.
    """
    pyplot = pyplot_without_screen()
    figure, panels = pyplot.subplots(1, len(summaries), figsize=(6.5 * len(summaries), 4.6), layout="constrained")
    for panel, (policy, of_policy) in zip(panels, summaries.items(), strict=True):
        for label, names in families.items():
            points = [of_policy[name] for name in names]
            panel.loglog(
                [point["tokens over primary"] for point in points],
                [point["compared"] for point in points],
                marker="o",
                markersize=4,
                label=label,
            )
        panel.set_title(policy)
        panel.set_xlabel("continuation tokens per token of the completions")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("error of the advantages on undecided prompts")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
