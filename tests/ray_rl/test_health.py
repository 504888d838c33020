from ray_rl.health import warnings_of

HEALTHY = {
    "rollout/truncated_rate": 0.1,
    "groups/decided_fraction": 0.5,
    "reward/mean": 0.4,
    "policy/grad_norm": 0.3,
    "policy/rollout_train_logprobs_abs_diff_mean": 1e-6,
}


def test_a_healthy_step_has_no_warnings():
    assert warnings_of(HEALTHY) == []


def test_each_way_to_learn_nothing_is_named():
    assert "truncated" in warnings_of(HEALTHY | {"rollout/truncated_rate": 1.0})[0]
    assert "too hard" in warnings_of(HEALTHY | {"groups/decided_fraction": 1.0, "reward/mean": 0.0})[0]
    assert "too easy" in warnings_of(HEALTHY | {"groups/decided_fraction": 1.0, "reward/mean": 1.0})[0]
    assert "gradient" in warnings_of(HEALTHY | {"policy/grad_norm": 0.0})[0]
    assert "not on-policy" in warnings_of(HEALTHY | {"policy/rollout_train_logprobs_abs_diff_mean": 0.5})[0]
