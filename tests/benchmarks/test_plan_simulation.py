import pytest

from benchmarks.plan.engine import step_seconds
from benchmarks.plan.rates import Rates, resolve_rates
from benchmarks.plan.simulation import Split, forecast
from ray_rl.config import resolve_config

STEP = 0.01
"""Seconds of a decoding step, whatever the batch."""


def rates_of(**changes) -> Rates:
    plain = {
        "engine": {"tokens_per_second": {1: 1 / STEP, 1000: 1000 / STEP}},
        "learner": {"tokens_per_second": 1000.0},
        "lengths": {"mean": 100, "cv": 0, "prompt": 0},
    }
    return resolve_rates(plain | changes)


def recipe(**sections):
    plain = {
        "rollout": {"group_size": 4, "max_tokens": 120, "max_sequences": 64},
        "training": {"prompts_per_step": 8},
        "values": {"kind": "none"},
        "advantage": {"kind": "grpo"},
        "model": {"max_model_len": 128},
    }
    return resolve_config({name: plain.get(name, {}) | sections.get(name, {}) for name in plain | sections})


ONE = Split(actors=1, ranks=1)
SAMPLING = 100 * STEP
"""Seconds of a batch that runs at once."""
TRAINING = 8 * 4 * 100 / 1000
"""Seconds of a step of one rank."""


def test_a_decoding_step_takes_what_was_measured_and_a_straight_line_in_between():
    seconds = step_seconds({2: 20.0, 4: 20.0})
    assert [seconds(count) for count in (1, 2, 3, 4, 8)] == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.4])


def test_a_synchronous_step_is_sampling_then_training_then_publishing():
    found = forecast(recipe(), rates_of(sync={"seconds": 0.25}, reward_seconds=0.5), ONE)
    step = SAMPLING + 0.5 + TRAINING + 0.25
    assert found.step_seconds == pytest.approx(step)
    assert found.tokens_per_step == 8 * 4 * 100
    assert found.rollout_idle == pytest.approx(1 - SAMPLING / step)
    assert found.learner_idle == pytest.approx(1 - TRAINING / step)
    assert found.sync_share == pytest.approx(0.25 / step)
    assert found.staleness == 0


def test_with_one_version_of_staleness_a_step_is_the_longer_of_sampling_and_training():
    stale = recipe(training={"max_staleness": 1})
    found = forecast(stale, rates_of(), ONE)
    assert found.step_seconds == pytest.approx(max(SAMPLING, TRAINING))
    assert found.learner_idle == pytest.approx(0, abs=1e-9)
    slow = {"tokens_per_second": {1: 0.1 / STEP, 1000: 100 / STEP}}
    full = recipe(training={"max_staleness": 1}, rollout={"max_sequences": 32})  # a batch fills the engine
    found = forecast(full, rates_of(engine=slow), ONE)
    assert found.step_seconds == pytest.approx(10 * SAMPLING)
    assert found.learner_idle == pytest.approx(1 - TRAINING / (10 * SAMPLING))
    assert found.rollout_idle == pytest.approx(0, abs=1e-6)


def test_sequences_beyond_the_batch_wait_for_a_place():
    found = forecast(recipe(rollout={"max_sequences": 16}), rates_of(), ONE)
    assert found.step_seconds == pytest.approx(2 * SAMPLING + TRAINING)


def test_the_long_tail_leaves_engines_idle():
    lengths = {"measured": [10, 10, 10, 120], "prompt": 0}
    found = forecast(recipe(), rates_of(lengths=lengths), Split(actors=4, ranks=1))
    assert found.step_seconds == pytest.approx(120 * STEP + found.tokens_per_step / 1000, rel=0.01)
    assert found.rollout_efficiency < 0.1


def test_prompts_and_continuations_take_their_time():
    lengths = {"mean": 100, "cv": 0, "prompt": 50}
    engine = {"tokens_per_second": {1: 1 / STEP, 1000: 1000 / STEP}, "prefill_tokens_per_second": 1000}
    prefill, prompts = 8 * 50 / 1000, 8 * 50 / 1000
    found = forecast(recipe(), rates_of(lengths=lengths, engine=engine), ONE)
    assert found.step_seconds == pytest.approx(prefill + SAMPLING + TRAINING + prompts)
    valued = recipe(values={"kind": "adaptive"}, advantage={"kind": "vineppo"}, rollout={"max_sequences": 256})
    twice = {"per_completion": 2, "tokens_ratio": 1.0}
    assert forecast(valued, rates_of(continuations=twice), ONE).step_seconds == pytest.approx(1.5 * SAMPLING + TRAINING)
    assert forecast(valued, rates_of(continuations=twice), ONE).tokens_per_step == 2 * 8 * 4 * 100


def test_ranks_share_the_tokens_and_a_part_of_the_cluster_stands_for_the_whole():
    config = recipe(training={"prompts_per_step": 64})
    whole = forecast(config, rates_of(), Split(actors=8, ranks=4))
    assert whole.step_seconds == pytest.approx(SAMPLING + 64 * 4 * 100 / 4000)
    part = forecast(config, rates_of(), Split(actors=8, ranks=4), most_groups=16)
    assert (part.parts, part.step_seconds, part.tokens_per_step) == (
        4,
        pytest.approx(whole.step_seconds),
        whole.tokens_per_step,
    )


def test_actors_that_can_never_have_a_group_are_idle():
    found = forecast(recipe(), rates_of(), Split(actors=16, ranks=1))
    assert found.rollout_idle == pytest.approx(1 - 0.5 * SAMPLING / found.step_seconds)


def test_an_engine_goes_on_under_new_weights_or_is_drained_first():
    """Half of the batch is long: with `wait` nothing else begins until it is done."""
    lengths = {"measured": [20, 100], "prompt": 0}
    stale = {"training": {"max_staleness": 1}, "rollout": {"max_sequences": 16}}
    kept = forecast(recipe(**stale), rates_of(lengths=lengths), ONE)
    drained = forecast(recipe(**stale, weights={"running": "wait"}), rates_of(lengths=lengths), ONE)
    assert drained.step_seconds > kept.step_seconds
    assert (kept.sync_share, drained.sync_share) == (0, pytest.approx(0.04))


def test_k_continuations_begin_as_soon_as_their_completion_is_there():
    fixed = recipe(values={"kind": "fixed"}, advantage={"kind": "vineppo"}, rollout={"max_sequences": 256})
    one = {"per_completion": 1, "tokens_ratio": 0.2}
    lengths = {"measured": [100, 10], "prompt": 0, "cv": 0}
    found = forecast(fixed, rates_of(continuations=one, lengths=lengths, reward_seconds=1.0), ONE)
    training = found.tokens_per_step / 1.2 / 1000
    assert found.step_seconds == pytest.approx(120 * STEP + 1.0 + training, rel=0.02)


def test_decided_groups_that_are_refilled_cost_sampling():
    refilled = recipe(training={"decided_groups": "refill"})
    found = forecast(refilled, rates_of(decided_share=0.5), ONE)
    assert found.dropped > 2
    assert found.tokens_per_step == pytest.approx((8 + found.dropped) * 4 * 100)
