import json

import pytest

from benchmarks.plan.rates import read_rates, resolve_rates
from benchmarks.plan.runs import fitted, rates_of_runs
from ray_rl.config import resolve_config
from ray_rl.errors import ConfigError
from ray_rl.run_state import RunFolder

ENGINE = (0.004, 0.0001)
"""Seconds of a decoding step: its own, and of each sequence."""
LEARNER = (0.2, 1 / 5000)
"""Seconds of an optimizer step: its own, and of each token."""
LEAST = {"engine": {"tokens_per_second": {8: 100}}, "learner": {"tokens_per_second": 1}}


def step_of(number, tokens, longest, **more):
    return {
        "step": number,
        "timing/rollout": ENGINE[0] * longest + ENGINE[1] * tokens,
        "timing/train": LEARNER[0] + LEARNER[1] * tokens,
        "timing/weight_sync": 0.3,
        "timing/step": 1.0,
        "tokens/primary": tokens,
        "tokens/continuations": 0.0,
        "rollout/response_length_max": longest,
        "rollout/response_length_mean": 40.0,
        "groups/decided_fraction": 0.25,
    } | more


def run_with(path, steps, **sections):
    plain = {
        "values": {"kind": "none"},
        "advantage": {"kind": "grpo"},
        "learner": {"minibatch_size": None},
        "rollout": {"group_size": 8},
    }
    RunFolder.create(path, resolve_config(plain | sections))
    lines = [step_of(1, 10, 10, **{"timing/train": 99.0}), *steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_batch_sizes_tell_what_is_fixed_and_what_each_token_costs(tmp_path):
    large = run_with(tmp_path / "a", [step_of(2, 10000, 90), step_of(3, 9000, 96)])
    small = run_with(tmp_path / "b", [step_of(2, 2500, 80)], training={"prompts_per_step": 8})
    rates = resolve_rates(rates_of_runs([large, small]))
    assert rates.engine.tokens_per_second == pytest.approx(
        {1: 1 / sum(ENGINE), 256: 256 / (ENGINE[0] + 256 * ENGINE[1])}
    )
    assert (rates.learner.fixed_seconds, rates.learner.tokens_per_second) == pytest.approx((0.2, 5000))
    assert rates.sync.total(1) == pytest.approx(0.3)
    assert (rates.lengths.measured, rates.decided_share) == ((40,), 0.25)


def test_one_batch_size_says_nothing_of_the_engine(tmp_path):
    found = rates_of_runs([run_with(tmp_path / "a", [step_of(2, 10000, 90), step_of(3, 9000, 96)])])
    assert "engine" not in found
    assert found["learner"]["tokens_per_second"] == pytest.approx(19000 / (0.4 + 19000 / 5000))
    with pytest.raises(ConfigError, match="rates: engine: is required"):
        resolve_rates(found)


def test_recorded_completions_give_the_spread_and_the_metrics_the_mean(tmp_path):
    run = run_with(tmp_path / "a", [step_of(2, 10000, 90)])
    group = {"trajectories": [{"token_ids": [1] * length} for length in (10, 30)]}
    (run / "groups.jsonl").write_text(json.dumps(group) + "\n")
    assert rates_of_runs([run])["lengths"]["measured"] == [20, 60]


def test_continuations_are_counted_per_completion(tmp_path):
    valued = {"tokens/continuations": 5000.0, "continuations/per_state": 2.0, "values/states": 512.0}
    run = run_with(
        tmp_path / "a", [step_of(2, 10000, 90, **valued)], values={"kind": "adaptive"}, advantage={"kind": "vineppo"}
    )
    assert rates_of_runs([run])["continuations"] == {"per_completion": 4.0, "tokens_ratio": 0.5}


def test_a_run_without_a_second_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no training step after its first"):
        rates_of_runs([run_with(tmp_path / "a", [])])


def test_a_fit_has_no_negative_parts():
    assert fitted([(1, 0), (1, 2)], [3.0, 7.0]) == pytest.approx((3.0, 2.0))
    assert fitted([(1, 1), (1, 2)], [1.0, 3.0]) == pytest.approx((0.0, 1.4))
    assert fitted([(1, 1), (1, 3)], [2.0, 1.0]) == pytest.approx((1.5, 0.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "engine.tokens_per_second={8: 100, 16: 90}",
            "rates: engine.tokens_per_second: more sequences must not be slower",
        ),
        ("engine.tokens_per_second={0: 100}", "rates: engine.tokens_per_second: .* greater than 0"),
        ("engine.tokens_per_second={}", "rates: engine.tokens_per_second: "),
        ("engine.tokens_per_second={8: .nan}", "rates: engine.tokens_per_second: .* at most 1e"),
        ("engine.tokens_per_second={8: 1e30}", "rates: engine.tokens_per_second: .* at most 1e"),
        ("lengths.mean=1e308", "rates: lengths.mean: "),
        ("lengths.cv=1e200", "rates: lengths.cv: "),
        ("lengths.measured=[3, -3]", "rates: lengths.measured.1: "),
        ("continuations.per_completion=1e12", "rates: continuations.per_completion: "),
        ("learner.speed=3", "rates: learner.speed: unknown key"),
        ("lengths.mean=.nan", "rates: lengths.mean: "),
        ("decided_share=2", "rates: decided_share: "),
    ],
)
def test_wrong_rates_are_one_line_with_their_path(override, message):
    with pytest.raises(ConfigError, match=message) as refused:
        resolve_rates(LEAST, [override])
    assert len(str(refused.value).splitlines()) == 1


def test_rates_are_read_from_a_file_and_from_a_result_of_the_suite(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("engine: {tokens_per_second: {8: 100}}\nlearner: {tokens_per_second: 1}")
    assert resolve_rates(read_rates(path)) == resolve_rates(LEAST)
    path.write_text(json.dumps({"cases": {"plan": {"details": {"rates": LEAST}}}}))
    assert resolve_rates(read_rates(path)) == resolve_rates(LEAST)
    path.write_text(json.dumps({"cases": {"step": {}}}))
    with pytest.raises(ConfigError, match="has no result of the case plan"):
        read_rates(path)
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a list"):
        read_rates(path)
