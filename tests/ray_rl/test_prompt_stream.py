"""The prompt stream: another permutation each epoch, exact restoration, and prompts that are never cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_rl.config import ConfigError
from ray_rl.prompt_stream import PromptStream, encode_problem
from ray_rl.types import Problem, Prompt
from tests.fakes import problem


def encode(row: Problem, *, position: int) -> Prompt:
    return Prompt(problem=row, position=position, token_ids=(1,))


def stream(size: int = 10, seed: int = 0, shuffle: bool = True, position: int = 0) -> PromptStream:
    return PromptStream(
        [problem(f"p{index}") for index in range(size)], encode, seed=seed, shuffle=shuffle, position=position
    )


def names(source: PromptStream, count: int) -> list[str]:
    return [source.next().problem.problem_id for _ in range(count)]


class Characters:
    """One token per character."""

    def encode_prompt(self, prompt, *, system_prompt=None, use_chat_template=None) -> tuple[int, ...]:
        if use_chat_template:
            raise ValueError("model.chat_template: the tokenizer has none")
        return tuple(map(ord, prompt))


def test_every_epoch_visits_each_problem_once_in_an_order_of_its_own():
    visited = names(stream(10), 30)
    epochs = [visited[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(f"p{index}" for index in range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_alone_decides_the_order():
    assert names(stream(seed=3), 25) == names(stream(seed=3), 25)
    assert names(stream(seed=3), 25) != names(stream(seed=4), 25)


def test_without_shuffling_the_problems_come_as_they_are():
    assert names(stream(3, shuffle=False), 7) == ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]


@given(size=st.integers(1, 12), seed=st.integers(), taken=st.integers(0, 40))
def test_a_restored_stream_goes_on_exactly_where_the_saved_one_stopped(size, seed, taken):
    whole = names(stream(size, seed), taken + 15)
    restored = stream(size, seed)
    restored.restore(taken)
    assert restored.position == taken
    assert names(restored, 15) == whole[taken:]


def test_positions_grow_over_epochs_and_make_prompt_ids_unique():
    source = stream(4)
    prompts = [source.next() for _ in range(12)]
    assert [prompt.position for prompt in prompts] == list(range(12))
    assert len({prompt.prompt_id for prompt in prompts}) == 12


def test_an_earlier_position_can_be_asked_for_without_moving():
    source = stream(5)
    first = [source.next() for _ in range(13)]
    assert [source.at(position) for position in range(13)] == first
    assert source.position == 13


def test_a_problem_that_cannot_be_encoded_leaves_the_position():
    def refuse(row: Problem, *, position: int) -> Prompt:
        raise ConfigError("no")

    source = PromptStream([problem()], refuse, seed=0, shuffle=True)
    with pytest.raises(ConfigError):
        source.next()
    assert source.position == 0


def test_no_problems_is_the_users_mistake():
    with pytest.raises(ConfigError, match="no training problems"):
        PromptStream([], encode, seed=0, shuffle=True)


def test_a_prompt_of_exactly_the_longest_length_is_taken_whole():
    prompt = encode_problem(Characters(), problem(prompt="abcd"), position=7, max_tokens=4)
    assert prompt.token_ids == tuple(map(ord, "abcd"))
    assert prompt.position == 7


def test_a_longer_prompt_is_refused_with_its_name_and_the_mend():
    with pytest.raises(ConfigError, match=r"^model\.max_model_len: .*problem row9 has 5 tokens.* leaves 4; raise"):
        encode_problem(Characters(), problem("row9", prompt="abcde"), position=0, max_tokens=4)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="row9: the prompt has no tokens"):
        encode_problem(Characters(), problem("row9", prompt=""), position=0, max_tokens=4)


def test_what_the_tokenizer_cannot_express_names_the_problem():
    with pytest.raises(ConfigError, match=r"^model\.chat_template: .*row9"):
        encode_problem(Characters(), problem("row9"), position=0, max_tokens=9, use_chat_template=True)


def test_a_look_ahead_finds_what_cannot_be_encoded_and_does_not_move_the_stream():
    def only_the_first_eight(row: Problem, *, position: int) -> Prompt:
        if row.problem_id == "p8":
            raise ConfigError("task: too long")
        return encode(row, position=position)

    problems = [problem(f"p{index}") for index in range(10)]
    whole = PromptStream(problems, only_the_first_eight, seed=0, shuffle=True, position=3)
    with pytest.raises(ConfigError, match="too long"):
        whole.check(60)
    assert whole.position == 3
    PromptStream(problems, only_the_first_eight, seed=0, shuffle=False).check(0)


def test_a_prompt_of_megabytes_is_too_long_before_it_is_encoded():
    class Never:
        def encode_prompt(self, prompt, *, system_prompt=None, use_chat_template=None) -> tuple[int, ...]:
            raise AssertionError("it was encoded")

    for prompt in ("x" * 10**7, [{"role": "user", "content": "x" * 10**7}]):
        row = Problem(problem_id="p0", prompt=prompt, answer="")
        with pytest.raises(
            ConfigError, match=r"^model\.max_model_len: the prompt of problem p0 has 10000000 characters"
        ):
            encode_problem(Never(), row, position=0, max_tokens=128)
