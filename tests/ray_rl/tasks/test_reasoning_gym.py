"""reasoning-gym problems: lazy, repeatable, splits that cannot meet, scorers that can be rebuilt."""

import pytest
import reasoning_gym

from ray_rl.config import ConfigError
from ray_rl.config.task import ReasoningGymTaskConfig
from ray_rl.tasks import make_task
from ray_rl.tasks.reasoning_gym import split_of

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def task(**changes):
    return make_task(ReasoningGymTaskConfig(**({"train_size": 300, "eval_size": 20} | changes)))


def test_the_splits_never_share_a_question_even_when_there_are_few():
    source = task(options=SMALL)
    train = {problem.prompt for problem in source.problems("train")}
    held_out = [problem.prompt for problem in source.problems("eval")]
    assert len(held_out) == len(set(held_out)) == 20
    assert len(train) > 50
    assert not train & set(held_out)


def test_another_seed_or_size_moves_no_question_into_the_other_split():
    train = {problem.prompt for seed in (0, 1) for problem in task(options=SMALL, seed=seed).problems("train")}
    held_out = {p.prompt for seed in (7, 8) for p in task(options=SMALL, seed=seed, eval_size=30).problems("eval")}
    assert not train & held_out


def test_problems_are_the_same_each_time_and_in_any_order_of_asking():
    first, second = task().problems("train"), task().problems("train")
    assert [second[index] for index in (5, 3, 299)] == [first[index] for index in (5, 3, 299)]
    assert task(seed=1).problems("train")[5] != first[5]
    assert first[-1] == first[299]
    assert list(first[2:4]) == [first[2], first[3]]


def test_nothing_is_generated_before_it_is_asked_for():
    assert len(task(dataset="countdown", train_size=10**6).problems("train")) == 10**6


def test_the_metadata_rebuilds_the_scorer():
    problem = task(dataset="chain_sum", options=SMALL).problems("train")[0]
    rebuilt = reasoning_gym.create_dataset(problem.metadata["dataset"], **problem.metadata["options"], size=1)
    assert rebuilt.score_answer(problem.answer, problem.metadata["entry"]) == 1.0
    assert rebuilt.score_answer("no", problem.metadata["entry"]) == 0.0
    assert problem.metadata["entry"]["question"] == problem.prompt


def test_the_suffix_belongs_to_the_prompt_and_not_to_the_question():
    problem = task(prompt_suffix=" Number only.").problems("eval")[0]
    assert problem.prompt == problem.metadata["entry"]["question"] + " Number only."
    assert split_of(problem.metadata["entry"]["question"]) == "eval"


def test_a_generator_with_few_questions_gives_fewer_held_out_ones(caplog):
    held_out = task(options=SMALL, eval_size=500).problems("eval")
    assert 10 < len(held_out) < 100
    assert "task.eval_size: chain_sum has only" in caplog.text


def test_a_generator_made_for_one_pass_can_be_drawn_from_beyond_its_size():
    assert len({problem.prompt for problem in task(dataset="acre", train_size=40).problems("train")}) > 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "chain_sun"}, r"task\.dataset: reasoning-gym has no 'chain_sun'; it has for instance .*chain_sum"),
        ({"options": {"nonsense": 1}}, r"task\.options: chain_sum does not take .*nonsense"),
        ({"options": {"min_terms": 0}}, r"task\.options: chain_sum does not take .*min_terms"),
        ({"options": {"seed": 1}}, r"task\.options\.seed: is set by task\.seed"),
        ({"options": {"size": 1}}, r"task\.options\.size: is set by task\.train_size"),
    ],
)
def test_faults_name_the_key_and_the_mend(changes, message):
    with pytest.raises(ConfigError, match=message):
        task(**changes)
