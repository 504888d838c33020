"""What is read from learning curves (pure)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from benchmarks.learn.cells import Point


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Of several seeds, point by point; they were evaluated after the same steps."""
    return [
        Point(
            step=points[0].step,
            accuracy=statistics.fmean(point.accuracy for point in points),
            tokens=statistics.fmean(point.tokens for point in points),
            seconds=statistics.fmean(point.seconds for point in points),
        )
        for points in zip(*curves, strict=True)
    ]


def best(curve: Sequence[Point]) -> float:
    """Highest accuracy."""
    return max(point.accuracy for point in curve)


def final(curve: Sequence[Point], last: int = 3) -> float:
    """Mean accuracy of the last evaluations: what a learning rate is chosen by."""
    return statistics.fmean(point.accuracy for point in curve[-last:])


def price_of(accuracy: float, curve: Sequence[Point], price: str) -> float:
    """Updates (`step`), `tokens` or `seconds` until a curve first reaches an accuracy, interpolated; nan if never."""
    for before, after in itertools.pairwise(curve):
        if before.accuracy < accuracy <= after.accuracy:
            share = (accuracy - before.accuracy) / (after.accuracy - before.accuracy)
            return getattr(before, price) + share * (getattr(after, price) - getattr(before, price))
    return getattr(curve[0], price) if curve[0].accuracy >= accuracy else math.nan
