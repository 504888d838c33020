"""What the gauges show, and the dashboard that shows them. A live run's endpoint: tests/integration/test_watch.py."""

import asyncio
import math

import pytest

from ray_rl.mailbox import RunStatus
from ray_rl.protocols import ActorStatus
from ray_rl.ray_gauges import PREFIX, RayGauges, descriptions
from tests.dashboard import DASHBOARD, PROMETHEUS, expressions, metric_names

EXPORTED = {PREFIX + name for name in descriptions()}


def status(**changes) -> RunStatus:
    actors = (
        ActorStatus(name="rollout actor 0", state="serving", groups=3, served=7),
        ActorStatus(name="rollout actor 1", state="starting", groups=0, served=0),
    )
    values = {
        "name": "test",
        "step": 4,
        "steps": 9,
        "phase": "training",
        "seconds_since_step": 1.5,
        "policy_version": 4,
        "buffer_depth": 2,
        "actors_wanted": 2,
        "actors": actors,
        "actors_died": 1,
        "learner_restarts": 0,
        "ledger": {},
        "metrics": {},
    }
    return RunStatus(**(values | changes))


def readings(gauges: RayGauges) -> dict[str, float]:
    return {":".join([name, *tags.values()]): value for name, value, tags in gauges.readings(status())}


def test_what_the_run_is_doing_is_there_before_the_first_step():
    shown = readings(RayGauges("test", "folder"))
    assert (shown["rl_step"], shown["rl_actors_alive"], shown["rl_actors_serving"]) == (4, 2, 1)
    assert (shown["rl_groups_in_flight"], shown["rl_buffer_depth"], shown["rl_actors_died"]) == (3, 2, 1)
    assert "rl_reward_mean" not in shown


def test_the_last_value_of_each_metric_is_shown_and_what_is_no_number_is_left_out():
    gauges = RayGauges("test", "folder")
    gauges.log(1, {"reward/mean": 0.25, "timing/train": 2.0, "policy/entropy": 1.0})
    gauges.log(2, {"reward/mean": 0.5, "policy/entropy": math.nan})
    shown = readings(gauges)
    assert (shown["rl_reward_mean"], shown["rl_phase_seconds:train"], shown["rl_entropy"]) == (0.5, 2.0, 1.0)


def test_of_steps_that_are_undone_nothing_is_shown():
    gauges = RayGauges("test", "folder")
    gauges.log(2, {"reward/mean": 0.5})
    gauges.rewind(1)
    assert "rl_reward_mean" not in readings(gauges)


def test_a_run_goes_on_when_its_gauges_cannot_be_set(caplog):
    def broken() -> RunStatus:
        raise RuntimeError("no status")

    async def run() -> str:
        async with RayGauges("test", "folder").shown(broken):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return "went on"

    assert asyncio.run(run()) == "went on"
    assert "no status" in caplog.text


def test_the_dashboard_shows_every_gauge_and_no_other():
    assert metric_names(expressions()) == EXPORTED


def test_every_panel_takes_its_numbers_from_the_chosen_source_and_run():
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == source
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert 'run=~"$run"' in target["expr"]
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}


@pytest.mark.parametrize("first", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_no_panel_covers_another(first):
    def cells(panel) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        return {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }

    others = [panel for panel in DASHBOARD["panels"] if panel["id"] != first["id"]]
    assert not any(cells(first) & cells(panel) for panel in others)


def test_prometheus_finds_its_targets_in_files():
    (job,) = PROMETHEUS["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert "/tmp/ray/prom_metrics_service_discovery.json" in discovery["files"]
    assert all(name.endswith(".json") and "*" not in name.rpartition("/")[0] for name in discovery["files"])
