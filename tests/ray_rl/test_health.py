import math

import pytest

from ray_rl.config import resolve_config
from ray_rl.health import CHECKS, Health

HEALTHY = {
    "rollout/truncated_rate": 0.1,
    "groups/decided_fraction": 0.5,
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "reward/failures": 0.0,
    "staleness/max": 0.0,
    "loss/total": -0.01,
    "policy/grad_norm": 0.3,
    "policy/entropy": 0.8,
    "policy/kl": 0.01,
    "policy/ratio_mean": 1.0,
    "policy/ratio_max": 1.5,
    "policy/clip_fraction": 0.02,
    "policy/rollout_train_logprobs_abs_diff_mean": 1e-6,
    "timing/step": 10.0,
    "timing/engines_idle": 9.0,
}


def health(**sections) -> Health:
    return Health(resolve_config(sections))


def warnings_of(changes: dict[str, float], before: int = 0, **sections) -> list[str]:
    """Of a step that differs from healthy ones; `before`: healthy steps that came first."""
    watched = health(**sections)
    for step in range(1, before + 1):
        assert watched.check(step, HEALTHY) == []
    return watched.check(before + 1, HEALTHY | changes)


def test_a_healthy_run_has_no_warnings():
    assert warnings_of({}, before=20) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout/truncated_rate": 1.0}, ["100%", "rollout.max_tokens = 128"]),
        ({"groups/decided_fraction": 1.0, "reward/mean": 0.0}, ["mean 0", "too hard"]),
        ({"groups/decided_fraction": 1.0, "reward/mean": 1.0}, ["mean 1", "too easy"]),
        ({"groups/decided_fraction": 1.0, "reward/mean": 0.5}, ["mean 0.5", "always or never"]),
        ({"policy/grad_norm": 0.0, "advantage/fraction_nonzero": 0.0}, ["gradient is 0", "0% of the tokens"]),
        ({"policy/grad_norm": 0.0, "policy/skipped_minibatches": 4.0}, ["gradient is 0", "4 minibatches"]),
        ({"policy/kl": 1.5}, ["KL 1.5", "learner.kl.coefficient"]),
        ({"policy/ratio_max": 1e4}, ["up to 1e+04", "learner.optimizer.lr"]),
        ({"policy/ratio_mean": 0.2}, ["0.2 on average"]),
        ({"policy/clip_fraction": 0.7}, ["70% of the tokens clipped"]),
        ({"reward/failures": 0.0125}, ["1.25%", "stops at 20%"]),
        ({"policy/rollout_train_logprobs_abs_diff_mean": 0.06}, ["0.06", "training.warn_mismatch = 0.05"]),
        ({"loss/total": math.nan, "policy/grad_norm": math.inf}, ["loss/total is nan", "policy/grad_norm is inf"]),
    ],
)
def test_what_one_step_shows_is_told_with_its_number(changes, words):
    (warning,) = warnings_of(changes)
    assert [word for word in words if word not in warning] == []


def test_an_entropy_far_below_the_first_steps_is_a_collapse_and_needs_first_steps():
    low = {"policy/entropy": 0.02}
    assert "0.02 per token, 2.5% of the 0.8 of the first steps" in warnings_of(low, before=3)[0]
    assert warnings_of(low, before=2) == []
    assert warnings_of({"policy/entropy": 0.05}, before=3) == []


def test_a_leap_of_the_kl_is_told_before_it_is_large():
    (warning,) = warnings_of({"policy/kl": 0.2}, before=5)
    assert "KL 0.2 per token (median of the last 5 steps: 0.01)" in warning
    assert warnings_of({"policy/kl": 0.2}, before=4) == []
    assert warnings_of({"policy/kl": 0.09}, before=5) == []


def test_rewards_that_are_constant_over_steps_are_told():
    watched, constant = health(), HEALTHY | {"reward/mean": 0.1, "reward/std": 0.0}
    assert [watched.check(step, constant) for step in range(1, 5)] == [[]] * 4
    assert "every reward of the last 5 steps was 0.1" in watched.check(5, constant)[0]
    assert watched.metrics()["health/constant_reward"] == 1
    watched.check(6, constant | {"reward/mean": 0.2})
    assert watched.metrics()["health/constant_reward"] == 0


def test_rising_failures_are_told_apart_from_failures():
    watched = health()
    for step in range(1, 6):
        watched.check(step, HEALTHY | {"reward/failures": 0.01})
    rising = [warning for step in range(6, 11) for warning in watched.check(step, HEALTHY | {"reward/failures": 0.05})]
    assert len(rising) == 1
    assert "1.00% of all in 5 steps, 5.00% in the 5 after them" in rising[0]


def test_idle_engines_are_told_only_where_they_could_sample_ahead():
    watched = health(training={"max_staleness": 1})
    assert [watched.check(step, HEALTHY) for step in (1, 2)] == [[], []]
    assert "idle 90% of the last 3 steps" in watched.check(3, HEALTHY)[0]
    assert warnings_of({}, before=5) == []


def test_a_difference_from_older_samples_is_expected():
    assert warnings_of({"policy/rollout_train_logprobs_abs_diff_mean": 0.5, "staleness/max": 1.0}) == []


def test_what_lasts_or_comes_and_goes_is_said_every_ten_steps():
    watched, bad = health(), HEALTHY | {"policy/grad_norm": 0.0}
    said = {step: watched.check(step, HEALTHY if step in (3, 4) else bad) for step in range(1, 25)}
    assert [step for step, warnings in said.items() if warnings] == [1, 11, 21]
    assert "since" not in said[1][0]
    assert said[21][0].endswith("(since step 5)")


def test_the_gauges_show_a_warning_that_is_not_said_again():
    watched, bad = health(), HEALTHY | {"policy/grad_norm": 0.0, "policy/kl": 2.0}
    watched.check(1, bad)
    assert watched.check(2, bad) == []
    gauges = watched.metrics()
    assert gauges["health/warnings"] == 2
    assert {name for name, value in gauges.items() if value == 1} == {"health/zero_gradient", "health/kl_explosion"}
    assert set(gauges) == {"health/warnings", *(f"health/{name}" for name in CHECKS)}


def test_undone_steps_are_forgotten():
    watched = health()
    for step in range(1, 6):
        watched.check(step, HEALTHY | {"reward/std": 0.0})
    watched.check(2, HEALTHY)
    assert [watched.check(step, HEALTHY | {"reward/std": 0.0}) for step in (3, 4, 5, 6)] == [[]] * 4


def test_a_step_that_trained_nothing_is_no_fault_of_the_learner():
    sampled = {
        name: value for name, value in HEALTHY.items() if not name.startswith(("policy/", "loss/", "staleness/"))
    }
    assert health().check(1, sampled) == []
