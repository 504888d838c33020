import pytest

from ray_rl.autoscaling import PATIENCE, Autoscaler
from ray_rl.config.rollout import ActorRange


def step(rollout: float, idle: float = 0.0, seconds: float = 10.0) -> dict[str, float]:
    return {"timing/step": seconds, "timing/rollout": rollout, "timing/engines_idle": idle}


WAITED, QUIET, IDLE = step(rollout=5), step(rollout=2), step(rollout=0, idle=6)


def sizes(scaler: Autoscaler, steps: list[dict[str, float]], size: int) -> list[int]:
    """The size after each step, when every decision is carried out."""
    found = []
    for metrics in steps:
        size = scaler.decide(metrics, size)
        found.append(size)
    return found


@pytest.fixture
def scaler() -> Autoscaler:
    return Autoscaler(ActorRange(min=1, max=4), takes_turns=False)


def test_one_more_when_the_learner_waited_in_two_steps_in_a_row(scaler):
    assert sizes(scaler, [WAITED, QUIET, WAITED, WAITED], 1) == [1, 1, 1, 2]


def test_one_fewer_when_engines_were_idle_in_two_steps_in_a_row(scaler):
    assert sizes(scaler, [IDLE, QUIET, IDLE, IDLE], 3) == [3, 3, 3, 2]


def test_the_first_step_after_a_change_does_not_count(scaler):
    assert sizes(scaler, [WAITED] * 8, 1) == [1, 2, 2, 2, 3, 3, 3, 4]


def test_it_stays_within_its_bounds(scaler):
    assert sizes(scaler, [WAITED] * 4, 4) == [4] * 4
    assert sizes(scaler, [IDLE] * 4, 1) == [1] * 4


def test_idle_engines_speak_louder_than_a_waiting_learner(scaler):
    """Few groups with long tails: more engines would stand about as well."""
    both = step(rollout=8, idle=6)
    assert sizes(scaler, [both] * 2, 3) == [3, 2]


def test_a_size_that_was_too_large_is_not_tried_again_soon(scaler):
    assert sizes(scaler, [IDLE] * 2, 3) == [3, 2]
    later = sizes(scaler, [WAITED] * (PATIENCE + 2), 2)
    assert later[: PATIENCE - 1] == [2] * (PATIENCE - 1)
    assert later[-1] == 3


def test_somebody_elses_change_begins_the_count_anew(scaler):
    assert sizes(scaler, [WAITED], 1) == [1]
    assert sizes(scaler, [WAITED, WAITED, WAITED], 2) == [2, 2, 3]


class TestTakingTurns:
    """max_staleness 0: nothing is sampled while a step trains."""

    @pytest.fixture
    def scaler(self) -> Autoscaler:
        return Autoscaler(ActorRange(min=1, max=4), takes_turns=True)

    def test_rest_while_the_learner_trains_is_no_surplus(self, scaler):
        assert sizes(scaler, [step(rollout=2, idle=8)] * 3, 2) == [2, 2, 2]

    def test_one_fewer_when_sampling_takes_next_to_no_time(self, scaler):
        assert sizes(scaler, [step(rollout=0.5, idle=9.5)] * 2, 2) == [2, 1]

    def test_one_fewer_when_most_engines_have_no_group_while_others_sample(self, scaler):
        assert sizes(scaler, [step(rollout=6, idle=4 + 4)] * 2, 4) == [4, 3]

    def test_one_more_when_sampling_takes_most_of_the_step(self, scaler):
        assert sizes(scaler, [step(rollout=6, idle=4)] * 2, 1) == [1, 2]
