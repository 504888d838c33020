"""The built-in task: splits that cannot meet, an exact verifier, demonstrations of known quality."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_rl.tasks.arithmetic import (
    ALPHABET,
    SLIPS,
    ArithmeticTask,
    Slip,
    demonstration,
    evaluate,
    final_answer,
    make_problem,
    parse,
    split_of,
    verify,
)

CAREFUL = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
    "*": lambda a, b: (a * b) % 10,
}

SPLITS = {
    "9-8-2": "train",
    "9+6": "eval",
    "7*3*7": "train",
    "4+4+7+1*2-8": "eval",
    "2-4": "train",
}


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """Chains of one to nine one-digit steps."""
    steps = draw(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), min_size=1, max_size=9))
    return str(draw(st.integers(0, 9))) + "".join(f"{operator}{operand}" for operator, operand in steps)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("3+4*7-2", 7), ("7*8", 6), ("2-9", 3), ("9+9+9", 7), ("5*2+1-8*3", 9), ("0-1*9", 1)],
)
def test_hand_worked_chains(expression: str, answer: int) -> None:
    assert evaluate(expression) == answer


def test_the_hand_worked_demonstration_of_the_module() -> None:
    problem = make_problem("3+4*7-2", "example")
    assert problem.prompt == "3+4*7-2:\n"
    assert problem.answer == "7"
    assert problem.metadata == {"steps": 3}
    assert demonstration(problem, random.Random(0), slip_share=0) == "3+4=7\n7*7=9\n9-2=7\n#7"


@pytest.mark.parametrize("text", ["", "3", "3+", "+3", "3+44", "3/4", "3+4:\n", "3+4\n", "3 + 4", "\uff13+4"])
def test_what_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one-digit steps"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7\n#7", "7"),
        ("#1\n#2", "2"),
        ("# 7 \nand more", "7"),
        ("#7\n\n", "7"),
        ("3+4=7", None),
        ("#", None),
        ("7#\n7", None),
        ("", None),
        ("#-12.5", "-12.5"),
    ],
)
def test_final_answer_is_the_rest_of_the_line_after_the_last_marker(text: str, answer: str | None) -> None:
    assert final_answer(text, "#") == answer


def test_markers_of_several_characters() -> None:
    assert final_answer("so # 1\n#### 42\n", "####") == "42"
    assert verify("so\n#### 42", "42", "####") == 1.0


def test_verify_compares_exactly() -> None:
    assert verify("9-2=7\n#7", "7") == 1.0
    assert verify("9-2=7\n#07", "7") == 0.0
    assert verify("9-2=7\n#77", "7") == 0.0
    assert verify("9-2=7", "7") == 0.0
    assert verify("#7\n#3", "7") == 0.0


@given(st.text(), st.text(st.characters(exclude_characters="#\n"), min_size=1))
def test_whatever_precedes_the_marker_does_not_matter(before: str, answer: str) -> None:
    assert final_answer(f"{before}#{answer}\nafter", "#") == (answer.strip() or None)


@given(expressions(), st.integers())
def test_careful_demonstrations_always_verify(expression: str, seed: int) -> None:
    problem = make_problem(expression, "x")
    text = demonstration(problem, random.Random(seed), slip_share=0)
    assert verify(text, problem.answer) == 1.0
    assert not any(slip.sign in text for slip in SLIPS)


@given(expressions(), st.integers(), st.floats(0, 1))
def test_every_line_of_a_demonstration_follows_its_sign(expression: str, seed: int, slip_share: float) -> None:
    problem = make_problem(expression, "x")
    value, steps = parse(expression)
    *lines, last = demonstration(problem, random.Random(seed), slip_share).split("\n")
    rules = {("=", operator): rule for operator, rule in CAREFUL.items()}
    rules |= {(slip.sign, slip.operator): slip.result for slip in SLIPS}
    assert len(lines) == len(steps)
    for line, (operator, operand) in zip(lines, steps, strict=True):
        assert line[:3] == f"{value}{operator}{operand}"
        value = rules[line[3], operator](value, operand)
        assert line[4:] == str(value)
    assert last == f"#{value}"
    assert set(problem.prompt + "\n".join(lines) + last) <= set(ALPHABET)


def test_the_share_of_slips_is_what_was_asked_for() -> None:
    rng = random.Random(0)
    text = "".join(demonstration(make_problem("1+2*3-4+5*6", "x"), rng, slip_share=0.6) for _ in range(2000))
    slips = sum(text.count(slip.sign) for slip in SLIPS)
    # 10,000 steps: the standard error is 0.005.
    assert slips / (slips + text.count("=")) == pytest.approx(0.6, abs=0.02)
    assert all(text.count(slip.sign) > 50 for slip in SLIPS)


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_each_slip_is_a_digit_and_wrong_at_least_two_times_in_five(slip: Slip) -> None:
    pairs = list(product(range(10), range(1, 10)))
    assert all(0 <= slip.result(a, b) <= 9 for a, b in pairs)
    wrong = sum(slip.result(a, b) != CAREFUL[slip.operator](a, b) for a, b in pairs)
    assert wrong / len(pairs) >= 0.4


def test_slips_of_one_operator_differ_and_all_signs_differ() -> None:
    assert len(ALPHABET) == len(set(ALPHABET))
    for first, second in product(SLIPS, SLIPS):
        if first is not second and first.operator == second.operator:
            assert any(first.result(a, b) != second.result(a, b) for a, b in product(range(10), range(1, 10)))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="slip_share"):
        demonstration(make_problem("1+1", "x"), random.Random(0), share)


def test_the_splits_are_decided_by_the_text_alone() -> None:
    # Literal, because a changed hash would move evaluation problems into everybody's training data.
    assert {text: split_of(text) for text in SPLITS} == SPLITS


@given(st.integers(), st.integers(), st.integers(1, 6), st.integers(0, 3))
def test_training_and_evaluation_never_meet(seed: int, other_seed: int, shortest: int, more: int) -> None:
    steps = {"min_steps": shortest, "max_steps": shortest + more}
    training = ArithmeticTask(**steps, train_size=50, eval_size=10, seed=seed).problems("train")
    held_out = ArithmeticTask(**steps, train_size=9, eval_size=15, seed=other_seed).problems("eval")
    assert {problem.prompt for problem in training}.isdisjoint(problem.prompt for problem in held_out)


def test_evaluation_problems_are_distinct_and_right() -> None:
    problems = ArithmeticTask(min_steps=2, max_steps=3, eval_size=2000).problems("eval")
    assert len({problem.prompt for problem in problems}) == len(problems) == 2000
    for problem in problems:
        expression = str(problem.prompt).removesuffix(":\n")
        assert split_of(expression) == "eval"
        assert problem.answer == str(evaluate(expression))
        assert problem.metadata["steps"] in (2, 3)


def test_about_one_expression_in_eight_is_held_out() -> None:
    rng = random.Random(0)
    drawn = ["".join(rng.choices("0123456789", k=1)) + f"+{rng.randint(1, 9)}*{i}" for i in range(2, 4000)]
    assert sum(split_of(text) == "eval" for text in drawn) / len(drawn) == pytest.approx(1 / 8, abs=0.02)


@given(st.sampled_from(["train", "eval"]), st.integers(0, 39), st.integers())
def test_an_item_depends_on_seed_split_and_index_only(split: str, index: int, seed: int) -> None:
    whole = list(ArithmeticTask(train_size=40, eval_size=40, seed=seed).problems(split))
    alone = ArithmeticTask(train_size=10_000, eval_size=90, seed=seed).problems(split)[index]
    assert alone == whole[index]
    assert len({problem.problem_id for problem in whole}) == 40


def test_seeds_give_different_problems() -> None:
    first, second = (ArithmeticTask(seed=seed).problems("train")[:20] for seed in (0, 1))
    assert [problem.prompt for problem in first] != [problem.prompt for problem in second]


def test_a_far_away_training_problem_is_made_alone() -> None:
    problems = ArithmeticTask(train_size=10**12).problems("train")
    assert problems[10**12 - 1] == problems[-1]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_indexing_is_that_of_a_tuple(split: str) -> None:
    problems = ArithmeticTask(train_size=7, eval_size=7).problems(split)
    whole = tuple(problems)
    assert len(problems) == len(whole) == 7
    assert problems[-1] == whole[6]
    assert tuple(problems[1:6:2]) == whole[1:6:2]
    for index in (7, -8):
        with pytest.raises(IndexError):
            problems[index]


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_steps": 0},
        {"min_steps": 5, "max_steps": 4},
        {"train_size": 0},
        {"eval_size": 0},
        {"min_steps": 1, "max_steps": 1, "eval_size": 17},
    ],
)
def test_what_cannot_be_served_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"steps|sizes"):
        ArithmeticTask(**arguments)


def test_the_smallest_space_still_serves_what_it_promises() -> None:
    problems = ArithmeticTask(min_steps=1, max_steps=1, eval_size=16).problems("eval")
    assert len({problem.prompt for problem in problems}) == 16


def test_very_long_chains_are_no_trouble() -> None:
    problem = ArithmeticTask(min_steps=400, max_steps=400, eval_size=1).problems("eval")[0]
    assert verify(demonstration(problem, random.Random(0), slip_share=0), problem.answer) == 1.0
