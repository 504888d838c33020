"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learn.cells import Point
from benchmarks.learn.curves import mean_curve
from benchmarks.suite import pyplot_without_screen

_AXES = {"step": "updates", "tokens": "tokens sampled, thousands", "seconds": "seconds of training steps"}


def plot(curves: Mapping[str, Sequence[Sequence[Point]]], file: Path) -> None:
    """Accuracy against updates, tokens and seconds: the mean over seeds, and the spread of seeds behind it."""
    pyplot = pyplot_without_screen()
    figure, panels = pyplot.subplots(1, len(_AXES), figsize=(16, 4.8), sharey=True, layout="constrained")
    for panel, (price, label) in zip(panels, _AXES.items(), strict=True):
        scale = 1000 if price == "tokens" else 1
        for method, of_seeds in curves.items():
            mean = mean_curve(of_seeds)
            x = [getattr(point, price) / scale for point in mean]
            (line,) = panel.plot(x, [point.accuracy for point in mean], label=method, linewidth=1.8)
            at_once = list(zip(*([point.accuracy for point in curve] for curve in of_seeds), strict=True))
            panel.fill_between(x, list(map(min, at_once)), list(map(max, at_once)), color=line.get_color(), alpha=0.12)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_xscale("log")
    panels[2].set_xscale("log")
    panels[0].set_ylabel("held-out accuracy, sampled")
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
