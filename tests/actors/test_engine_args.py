import os

import pytest

from actors.engine_args import engine_args, engine_environment, prepare_environment
from ray_rl.config import load_config


def config(*overrides: str):
    return load_config("laptop-grpo", list(overrides))


@pytest.mark.parametrize(
    ("chosen", "eager", "bare"), [("true", True, True), ("null", True, False), ("false", False, False)]
)
def test_an_engine_on_cpu_is_eager_unless_told_otherwise_and_compiles_nothing_at_all_when_asked(chosen, eager, bare):
    asked = config(f"rollout.enforce_eager={chosen}")
    assert engine_args(asked, "model", seed=0)["enforce_eager"] is eager
    assert ("TORCHDYNAMO_DISABLE" in engine_environment(asked)) is bare


def test_an_engine_on_a_gpu_is_left_to_vllm():
    on_gpu = config("rollout.gpus_per_actor=1")
    assert "TORCHDYNAMO_DISABLE" not in engine_environment(on_gpu)


def test_what_the_engine_inherits_is_in_its_parent_s_environment(monkeypatch):
    for name in (*engine_environment(config()), "VLLM_CPU_KVCACHE_SPACE", "RAY_RL_ENGINE_OWNER_PID"):
        monkeypatch.setenv(name, "of the shell")
    prepare_environment(config())
    assert engine_environment(config()).items() <= os.environ.items()
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert os.environ["RAY_RL_ENGINE_OWNER_PID"] == str(os.getpid())
