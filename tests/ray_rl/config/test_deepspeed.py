import json

import pytest

from ray_rl.config import resolve_config
from ray_rl.errors import ConfigError


def with_deepspeed(settings, *overrides):
    return resolve_config({"learner": {"deepspeed": settings}}, list(overrides))


def test_a_json_file_of_another_trainer_is_merged_but_for_what_it_leaves_open(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
                "wall_clock_breakdown": False,
            }
        )
    )
    config = with_deepspeed(str(file), "learner.zero_stage=2")
    assert config.learner.deepspeed == {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            (),
            "zero_optimization.stage: 3, but learner.zero_stage makes it 0; set learner.z",
        ),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            (),
            "optimizer.params.lr: 0.1, but learner.optimizer.lr makes it 1e-06",
        ),
        ({"bf16": {"enabled": True}}, (), "bf16.enabled: true, but model.dtype makes it false"),
        ({"gradient_clipping": 5}, (), "gradient_clipping: 5, but learner.optimizer.grad_clip makes it 1.0"),
        ({"gradient_accumulation_steps": 4}, (), "gradient_accumulation_steps: is decided elsewhere"),
        ({"train_micro_batch_size_per_gpu": 4}, (), "leave it out and use learner.microbatch_tokens"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            ("learner.optimizer.schedule=linear",),
            "scheduler: and learner.optimizer's schedule",
        ),
    ],
)
def test_what_contradicts_the_recipe_is_refused_with_its_mend(settings, overrides, message):
    with pytest.raises(ConfigError) as caught:
        with_deepspeed(settings, *overrides)
    assert f"learner.deepspeed.{message}" in str(caught.value) or message in str(caught.value)


def test_what_says_the_same_is_no_contradiction():
    settings = {"zero_optimization": {"stage": 1}, "optimizer": {"params": {"lr": 1e-6, "betas": [0.9, 0.999]}}}
    assert with_deepspeed(settings, "learner.zero_stage=1").learner.deepspeed == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "holds a list, where DeepSpeed takes an object")],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, text, message):
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        with_deepspeed(str(file))


def test_offload_needs_zero():
    with pytest.raises(ConfigError, match=r"learner.offload_optimizer: needs ZeRO"):
        resolve_config({}, ["learner.offload_optimizer=true"])
