"""What a grader process answers, as it travels."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.verdicts import Failed, pack, shortened, unpack
from ray_rl.types import Reward

numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(Reward, value=numbers, parts=st.dictionaries(st.text(), numbers), failure=st.none() | st.text())
    | st.builds(Failed, reason=st.text(), spent=st.booleans())
    | st.text()
)
def test_every_answer_arrives_as_it_was(answer):
    assert unpack(pack(answer)) == answer


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_no_reward_wherever_it_stands(number):
    for reward in (Reward(value=number), Reward(value=0.0, parts={"part": number})):
        with pytest.raises(ValueError, match="not made of finite numbers"):
            unpack(pack(reward))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"null",
        b"1.0",
        b"{}",
        b'{"value": 1.0}',
        b'{"value": "1", "parts": {}, "failure": null}',
        b'{"value": 1.0, "parts": {"a": "1"}, "failure": null}',
        b'{"value": 1.0, "parts": [], "failure": null}',
        b'{"value": 1.0, "parts": {}, "failure": 3}',
        b'{"failed": "reason"}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(message):
    with pytest.raises(ValueError):  # noqa: PT011 (of many kinds)
        unpack(message)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["value", "parts", "failure", "failed", "spent", "text"]), inner)
        ),
    )
)
def test_no_json_becomes_a_reward_that_is_not_finite(said):
    try:
        answer = unpack(json.dumps(said).encode())
    except ValueError:
        return
    if isinstance(answer, Reward):
        assert all(map(math.isfinite, (answer.value, *answer.parts.values())))


def test_a_long_text_is_shown_by_its_ends():
    assert shortened("short") == "short"
    assert shortened("a" * 500 + "b" * 500) == f"{'a' * 200} [... 600 characters ...] {'b' * 200}"
