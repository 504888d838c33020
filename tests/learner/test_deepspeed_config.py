import math

import pytest

from learner.deepspeed_config import deepspeed_config, learning_rate_factor, merge
from ray_rl.config.learner import LearnerConfig, OptimizerConfig


def test_the_users_keys_win_at_every_depth_and_the_rest_stays():
    config = LearnerConfig(
        zero_stage=2,
        deepspeed={
            "zero_optimization": {"overlap_comm": True},
            "optimizer": {"params": {"amsgrad": True}},
            "extra": [1],
        },
    )
    result = deepspeed_config(config, "float32")
    assert result["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert result["optimizer"]["params"]["amsgrad"] is True
    assert result["optimizer"]["params"]["torch_adam"] is True
    assert result["extra"] == [1]
    assert result["managed_gradient_accumulation"] is False


def test_merging_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("bfloat16", 1), ("float16", 1)])
def test_sixteen_bit_formats_need_zero_for_their_master_weights(dtype, stage):
    assert deepspeed_config(LearnerConfig(), dtype)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    factor = learning_rate_factor(OptimizerConfig(warmup_share=1 / 3, schedule=schedule), 6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected)


def test_a_schedule_stays_at_its_end_when_a_run_goes_on():
    assert learning_rate_factor(OptimizerConfig(schedule="linear"), 4)(9) == 0.0
