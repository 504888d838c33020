"""GRPO and VinePPO from the same start, on the same data, each at its own best learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.learn.cells import Cell, Point, curve_of
from benchmarks.learn.curves import best, final, mean_curve, price_of
from benchmarks.learn.methods import GRPO, METHODS
from benchmarks.suite import Case, CaseResult, Options

RATES = (1.5e-4, 3e-4)
"""At 6e-4 accuracy falls, with GRPO and with VinePPO alike."""
SEEDS = (0, 1, 2)
_AT_ONCE = 2
"""Cells that train side by side: each keeps little more than a core busy. All have the same company."""
_PRICES = ("step", "tokens", "seconds")


def run(options: Options) -> CaseResult:
    """Search each method's learning rate with the first seed, then repeat the best one with the others."""
    folder = options.work / ("learn-quick" if options.quick else "learn")
    folder.mkdir(parents=True, exist_ok=True)
    methods, rates, seeds, shared = _plan(options.quick)
    learn = partial(_learn, folder=folder, shared=shared)
    found = learn([Cell(method=method, lr=lr, seed=seeds[0]) for method in methods for lr in rates])

    def searched(method: str, lr: float) -> float:
        return final(found[Cell(method=method, lr=lr, seed=seeds[0])])

    chosen = {method: max(rates, key=partial(searched, method)) for method in methods}
    cells = {method: [Cell(method=method, lr=lr, seed=seed) for seed in seeds] for method, lr in chosen.items()}
    found |= learn([cell for of_method in cells.values() for cell in of_method])
    curves = {method: [found[cell] for cell in of_method] for method, of_method in cells.items()}
    from benchmarks.learn.plot import plot

    plot(curves, options.work / "learn.png")
    rows = _rows(curves, chosen)
    details = {cell.name: [asdict(point) for point in curve] for cell, curve in found.items()}
    return CaseResult(headline=_headline(curves), rows=rows, details=details)


def _learn(cells: Sequence[Cell], *, folder: Path, shared: Sequence[str]) -> dict[Cell, list[Point]]:
    """Train what is not trained yet; a failing cell ends the case once those beside it are done."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(cells, pool.map(partial(curve_of, folder=folder, shared=shared), cells), strict=True))


def _plan(quick: bool) -> tuple[Sequence[str], Sequence[float], Sequence[int], Sequence[str]]:
    if quick:
        shared = ("training.steps=8", "evaluation.problems=128")
        return (GRPO, "vineppo adaptive"), RATES[1:], SEEDS[:1], shared
    return tuple(METHODS), RATES, SEEDS, ()


def _rows(curves: Mapping[str, Sequence[Sequence[Point]]], chosen: Mapping[str, float]) -> list[dict[str, Any]]:
    target = best(mean_curve(curves[GRPO]))
    rows = []
    for method, of_seeds in curves.items():
        mean = mean_curve(of_seeds)
        finals = [final(curve) for curve in of_seeds]
        updates, tokens, seconds = (price_of(target, mean, price) for price in _PRICES)
        rows.append(
            {
                "method": method,
                "lr": f"{chosen[method]:g}",
                "final accuracy": final(mean),
                "seeds": f"{min(finals):.3f}-{max(finals):.3f}",
                "best": best(mean),
                "updates to GRPO's best": updates,
                "k tokens": tokens / 1000,
                "seconds": seconds,
            }
        )
    return rows


def _headline(curves: Mapping[str, Sequence[Sequence[Point]]]) -> dict[str, float]:
    """The best VinePPO variant by seconds to GRPO's best accuracy, over GRPO; nan if none gets there."""
    means = {method: mean_curve(of_seeds) for method, of_seeds in curves.items()}
    target = best(means[GRPO])
    prices = {price: price_of(target, means[GRPO], price) for price in _PRICES}
    variants = [mean for method, mean in means.items() if not method.startswith(GRPO)]
    reached = [mean for mean in variants if not math.isnan(price_of(target, mean, "seconds"))]
    winner = min(reached, key=lambda mean: price_of(target, mean, "seconds"), default=None)

    def ratio(price: str) -> float:
        return price_of(target, winner, price) / prices[price] if winner else math.nan

    return {
        "updates_ratio": ratio("step"),
        "tokens_ratio": ratio("tokens"),
        "seconds_ratio": ratio("seconds"),
        "final_gain": final(winner) - final(means[GRPO]) if winner else math.nan,
    }


LEARN = Case(name="learn", about="held-out accuracy against updates, tokens and seconds, GRPO and VinePPO", run=run)
