import json
import math
import subprocess

import pytest

from benchmarks.learn import cells
from benchmarks.learn.case import _headline, _rows
from benchmarks.learn.cells import Cell, Point, curve_of, read_curve
from benchmarks.learn.curves import best, final, mean_curve, price_of
from benchmarks.learn.methods import GRPO, METHODS
from ray_rl.config import load_config


def curve(*accuracies, tokens=100.0, seconds=2.0):
    return [
        Point(step=2 * i, accuracy=accuracy, tokens=tokens * i, seconds=seconds * i)
        for i, accuracy in enumerate(accuracies)
    ]


def test_a_curve_adds_up_what_training_cost_and_leaves_evaluation_out():
    step = {"timing/step": 3.0, "tokens/primary": 10.0, "tokens/continuations": 5.0}
    lines = [{"eval/pass@1": 0.1}, step, step | {"eval/pass@1": 0.2, "timing/evaluation": 99.0}]
    assert read_curve([json.dumps(line) for line in lines]) == [
        Point(step=0, accuracy=0.1, tokens=0.0, seconds=0.0),
        Point(step=2, accuracy=0.2, tokens=30.0, seconds=6.0),
    ]


def test_the_price_of_an_accuracy_is_interpolated_at_its_first_crossing():
    learned = curve(0.1, 0.3, 0.2, 0.6)
    assert price_of(0.2, learned, "step") == pytest.approx(1.0)
    assert price_of(0.4, learned, "tokens") == pytest.approx(250.0)
    assert math.isnan(price_of(0.7, learned, "seconds"))
    assert price_of(0.05, learned, "seconds") == 0.0


def test_means_over_seeds_and_over_the_last_evaluations():
    assert [point.accuracy for point in mean_curve([curve(0.0, 0.2), curve(0.2, 0.4)])] == pytest.approx([0.1, 0.3])
    assert final(curve(0.9, 0.1, 0.2, 0.3)) == pytest.approx(0.2)
    assert best(curve(0.9, 0.1)) == 0.9


def test_the_headline_compares_the_quickest_variant_with_grpo():
    curves = {
        "grpo": [curve(0.1, 0.2, 0.3, 0.4)],
        "grpo masked": [curve(0.1, 0.9, 0.9, 0.9)],
        "vineppo K=9": [curve(0.1, 0.5, 0.6, 0.7, seconds=20.0)],
        "vineppo adaptive": [curve(0.1, 0.4, 0.6, 0.8)],
    }
    headline = _headline(curves)
    assert headline["updates_ratio"] == pytest.approx(1 / 3)
    assert headline["seconds_ratio"] == pytest.approx(1 / 3)
    assert headline["final_gain"] == pytest.approx(0.6 - 0.3)
    rows = _rows(curves, dict.fromkeys(curves, 3e-4))
    assert [row["best"] for row in rows] == [0.4, 0.9, 0.7, 0.8]


def test_a_variant_that_never_gets_there_has_no_ratio():
    headline = _headline({"grpo": [curve(0.1, 0.9)], "vineppo adaptive": [curve(0.1, 0.2)]})
    assert all(math.isnan(value) for value in headline.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_recipe(method):
    config = load_config(str(cells.RECIPE), METHODS[method])
    # The headline tells the variants of VinePPO from GRPO and its controls by their names.
    assert config.advantage.kind == ("grpo" if method.startswith(GRPO) else "vineppo")


def test_a_cell_is_trained_once_and_again_only_under_another_configuration(tmp_path, monkeypatch):
    trained = []

    def train(command, **_):
        trained.append(command)
        folder = tmp_path / "runs" / Cell(method="grpo", lr=1e-4, seed=0).name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"eval/pass@1": 0.5}) + "\n")

    monkeypatch.setattr(subprocess, "run", train)
    cell = Cell(method="grpo", lr=1e-4, seed=0)
    first = curve_of(cell, tmp_path, ["training.steps=3"])
    assert curve_of(cell, tmp_path, ["training.steps=3"]) == first
    assert len(trained) == 1
    curve_of(cell, tmp_path, ["training.steps=4"])
    assert len(trained) == 2
    recipe = tmp_path / "chains.yaml"
    recipe.write_text(cells.RECIPE.read_text().replace("max_steps: 9", "max_steps: 8"))
    monkeypatch.setattr(cells, "RECIPE", recipe)
    curve_of(cell, tmp_path, ["training.steps=4"])
    assert len(trained) == 3
