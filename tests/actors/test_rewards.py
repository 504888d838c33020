"""The verifiers, in the test's own process."""

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.rewards import RewardFunctionError, check_python_function, final_answer_of, make_verifier, normalised
from ray_rl.config.reward import ExactRewardConfig, MathRewardConfig, PythonRewardConfig, ReasoningGymRewardConfig
from ray_rl.types import Problem, Reward, ScoringItem


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch):
    """Loading a user's file adds its folder to the import path, which in a grader process is its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def item(text: str, answer: str = "", **metadata: object) -> ScoringItem:
    problem = Problem(problem_id="test:0", prompt="What is it?", answer=answer, metadata=metadata)
    return ScoringItem(problem=problem, completion_text=text)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("9*2=18\n#### 18", "18", 1.0),
        ("#### $1,234.50.\n", "1234.5", 1.0),
        ("####18.0", " 18 ", 1.0),
        ("#### 1,234,567", "1234567", 1.0),
        ("#### -0.0", "0", 1.0),
        ("#### -3", "3", 0.0),
        ("#### 12,34", "1234", 0.0),
        ("#### 17\n#### 18\nand so on", "18", 1.0),
        ("#### 18\n#### 17", "18", 0.0),
        ("18", "18", 0.0),
        ("####\n18", "18", 0.0),
        ("#### Paris.", "Paris", 1.0),
        ("#### paris", "Paris", 0.0),
        ("#### 1" + "0" * 400 + "1", "1" + "0" * 401, 0.0),
    ],
)
def test_exact_compares_what_follows_the_last_marker_as_a_number_or_as_text(text, answer, value):
    verify = make_verifier(ExactRewardConfig(marker="####"))
    assert verify(item(text, answer)) == Reward(value=value, parts={"exact": value})


def test_exact_without_a_reference_answer_is_a_failure():
    reward = make_verifier(ExactRewardConfig(failure=-1.0))(item("#", ""))
    assert reward.value == -1.0
    assert reward.failure == "no reference answer: problem test:0"


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
def test_every_spelling_of_a_number_is_normalised_to_the_same_text(number):
    assert len({normalised(f"{number:f}"), normalised(f"${number:,f}."), normalised(f" {number:f}00 ")}) == 1


@given(st.text())
@example("0\r.")
def test_normalising_twice_changes_nothing(text):
    once = normalised(text)
    assert normalised(once) == once


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"So the result is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"We get $2\sqrt{3}$", r"2\sqrt{3}", 1.0),
        (r"We get $2\sqrt{2}$", r"2\sqrt{3}", 0.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{72}", r"\boxed{72}", 1.0),
        ("The answer is 1,234", "1234", 1.0),
        ("no idea", "72", 0.0),
    ],
)
def test_math_finds_mathematically_equal_answers_equal(text, answer, value):
    assert make_verifier(MathRewardConfig())(item(text, answer)) == Reward(value=value, parts={"math": value})


def test_a_reference_answer_that_math_verify_cannot_read_is_a_failure():
    failure = make_verifier(MathRewardConfig())(item(r"\boxed{1}", "$$")).failure
    assert failure is not None
    assert failure.startswith("unreadable reference answer")


@pytest.mark.parametrize(
    ("text", "value"),
    [("<answer>1</answer> or rather <answer> 12 </answer>", 1.0), ("12", 1.0), ("it is <answer>13</answer>", 0.01)],
)
def test_reasoning_gym_scores_the_last_tag_by_its_own_rule(text, value):
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2}
    entry = dict(reasoning_gym.create_dataset("chain_sum", size=1, seed=7, **options)[0], answer="12")
    reward = make_verifier(ReasoningGymRewardConfig())(
        item(text, "12", entry=entry, dataset="chain_sum", options=options)
    )
    assert reward.failure is None
    assert reward.value == pytest.approx(value, abs=0.02)


def test_reasoning_gym_refuses_problems_of_other_tasks():
    failure = make_verifier(ReasoningGymRewardConfig())(item("12", "12", steps=3)).failure
    assert failure == "not a reasoning-gym problem: its metadata lacks dataset, entry"


@pytest.mark.parametrize(
    ("returned", "reward"),
    [
        ("0.25", Reward(value=0.25)),
        ("True", Reward(value=1.0)),
        ("{'reward': 2, 'style': 1}", Reward(value=2.0, parts={"style": 1.0})),
        ("{'right': 1, 'short': 0.5}", Reward(value=1.5, parts={"right": 1.0, "short": 0.5})),
        ("len(prompt) + len(completion) + len(answer) + metadata['n']", Reward(value=11 + 3 + 2 + 4.0)),
        ("float('nan')", Reward(value=-2.0, failure="not a finite number: the function's result is nan")),
        ("{'a': float('-inf')}", Reward(value=-2.0, failure="not a finite number: part 'a' is -inf")),
        ("None", Reward(value=-2.0, failure="not a number: the function's result is of type NoneType")),
        ("{'a': '1'}", Reward(value=-2.0, failure="not a number: part 'a' is of type str")),
        ("{}", Reward(value=-2.0, failure="not a reward: the function returned an empty dict")),
        ("3", Reward(value=3.0)),
        ("-0.0", Reward(value=-0.0)),
        ("numpy.float32(0.5)", Reward(value=0.5)),
        ("numpy.int64(2)", Reward(value=2.0)),
        ("numpy.bool_(True)", Reward(value=1.0)),
        ("numpy.float64('nan')", Reward(value=-2.0, failure="not a finite number: the function's result is nan")),
        ("numpy.ones(1)", Reward(value=-2.0, failure="not a number: the function's result is of type numpy.ndarray")),
        ("1j", Reward(value=-2.0, failure="not a number: the function's result is of type complex")),
        (
            "numpy.complex128(1)",
            Reward(value=-2.0, failure="not a number: the function's result is of type numpy.complex128"),
        ),
        ("'1.0'", Reward(value=-2.0, failure="not a number: the function's result is of type str")),
        ("[1.0]", Reward(value=-2.0, failure="not a number: the function's result is of type list")),
        ("10**400", Reward(value=-2.0, failure="not a finite number: the function's result is too large")),
        ("{'reward': 1, 'a': float('nan')}", Reward(value=-2.0, failure="not a finite number: part 'a' is nan")),
        ("{'reward': None, 'a': 1}", Reward(value=-2.0, failure="not a number: part 'reward' is of type NoneType")),
        (
            "{'a': 1e308, 'b': 1e308}",
            Reward(value=-2.0, failure="not a finite number: the sum of the parts is too large"),
        ),
        ("{1: True}", Reward(value=1.0, parts={"1": 1.0})),
    ],
)
def test_a_python_function_gives_a_number_or_named_parts(tmp_path, returned, reward):
    file = tmp_path / "mine.py"
    file.write_text(f"import numpy\ndef score(prompt, completion, answer, metadata):\n    return {returned}\n")
    verify = make_verifier(PythonRewardConfig(function=f"{file}:score", failure=-2.0))
    assert verify(item("abc", "12", n=4)) == reward


def test_a_python_function_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_reward.py").write_text("VALUE = 0.75\n")
    file = tmp_path / "mine.py"
    file.write_text("from neighbour_of_reward import VALUE\ndef score(*arguments): return VALUE\n")
    assert make_verifier(PythonRewardConfig(function=f"{file}:score"))(item("")).value == 0.75


@pytest.mark.parametrize(
    "source",
    [
        "def score(prompt, completion, answer, metadata): ...",
        "def score(prompt, completion, answer, metadata, *, strict=True): ...",
        "def score(*everything): ...",
        "from elsewhere import score",
        "score = make()",
        "try:\n    from fast import score\nexcept ImportError:\n    def score(a, b, c, d): ...",
    ],
)
def test_a_usable_function_is_accepted_without_running_its_file(tmp_path, source):
    file = tmp_path / "mine.py"
    file.write_text(f"{source}\nraise SystemExit('this file was run')\n")
    check_python_function(f"{file}:score")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (None, "no file"),
        ("def score(:", "is not Python"),
        ("\0", "is not Python"),
        ("(" * 9000, "is not Python"),
        ("def other(a, b, c, d): ...", "defines no 'score'"),
        ("class A:\n    def score(self, a, b, c): ...", "defines no 'score'"),
        ("async def score(a, b, c, d): ...", "is async"),
        ("def score(completion, answer): ...", "must take the 4 positional arguments"),
        ("def score(a, b, c, d, e): ...", "must take the 4 positional arguments"),
        ("def score(a, b, c, d, *, e): ...", "must take the 4 positional arguments"),
    ],
)
def test_an_unusable_function_is_refused(tmp_path, source, complaint):
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(RewardFunctionError, match=complaint):
        check_python_function(f"{file}:score")


@pytest.mark.parametrize(
    ("config", "text", "answer"),
    [
        (ExactRewardConfig(), "3+4=7\n# 7.0", "7"),
        (ExactRewardConfig(), "nothing", ""),
        (MathRewardConfig(), r"hence \boxed{\frac{2}{4}}", "1/2"),
        (MathRewardConfig(), "nothing", ""),
        (ReasoningGymRewardConfig(), "so <answer> a b </answer>.", "a b"),
        (ReasoningGymRewardConfig(answer_tag=None), " <answer>a</answer> ", "<answer>a</answer>"),
        (PythonRewardConfig(function="mine.py:score"), " all of it\n", "all of it"),
    ],
)
def test_final_answers_are_what_majority_votes_compare(config, text, answer):
    assert final_answer_of(config, text) == answer


@pytest.mark.parametrize("place", ["~nobody_of_that_name/x.py", "a" * 5000 + ".py", "no\0file.py", "/proc/1/mem.py"])
def test_a_place_that_cannot_be_one_holds_no_function(place):
    with pytest.raises(RewardFunctionError, match=r"^reward\.function: no file "):
        check_python_function(f"{place}:score")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RewardFunctionError, match="is not Python"):
        check_python_function(f"{tmp_path / 'mine.py'}:score")
