import pytest

from ray_rl.config import resolve_config
from ray_rl.placement import PlacementError, missing_resources, required_resources, wait_for_resources


def test_required_counts_actors_ranks_and_reward_actors():
    config = resolve_config(
        {"reward": {"kind": "math"}, "rollout": {"actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 1}},
        ["learner.ranks=2", "learner.gpus_per_rank=1", "reward_actors.actors=4"],
    )
    assert required_resources(config) == {"CPU": 3 * 2 + 2 + 4 * 0.5, "GPU": 5}
    assert required_resources(config, with_learner=False) == {"CPU": 8, "GPU": 3}


def test_missing_is_what_the_cluster_lacks():
    assert missing_resources({"CPU": 4, "GPU": 2}, {"CPU": 8, "GPU": 1}) == {"GPU": 1}


async def test_the_error_names_what_is_missing():
    with pytest.raises(PlacementError, match=r"lacks 1 GPU"):
        await wait_for_resources({"GPU": 2}, lambda: {"GPU": 1}, timeout=0.02, interval=0.01)


async def test_nodes_that_join_meanwhile_count():
    answers = iter([{"GPU": 1}, {"GPU": 2}])
    await wait_for_resources({"GPU": 2}, lambda: next(answers), timeout=1, interval=0.01)
    assert next(answers, None) is None
