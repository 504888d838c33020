"""Label selectors: what is refused, and what they mean. That Ray means the same is tests/integration/test_placement.py's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector, validate_node_label_syntax

from ray_rl.config import ConfigError, resolve_config
from ray_rl.config.labels import is_selected


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("a", ["a"]),
        ("!a", ["b", "c", None]),
        ("in(a,b)", ["a", "b"]),
        ("in(a)", ["a"]),
        ("!in(a,b)", ["c", None]),
    ],
)
def test_what_a_condition_chooses(condition, chosen):
    labels = {label: {"pool": label} if label else {"zone": "a"} for label in ("a", "b", "c", None)}
    assert [label for label, node in labels.items() if is_selected({"pool": condition}, node)] == chosen


def test_all_conditions_must_hold_and_none_hold_always():
    assert is_selected({}, {})
    assert is_selected({"pool": "a", "zone": "!b"}, {"pool": "a"})
    assert not is_selected({"pool": "a", "zone": "b"}, {"pool": "a"})


def test_blanks_which_ray_would_take_for_part_of_a_value_go():
    config = resolve_config({}, ["rollout.labels={pool: '!in( a, b )', zone: ' c '}"])
    assert config.rollout.labels == {"pool": "!in(a,b)", "zone": "c"}


@pytest.mark.parametrize(
    "condition", ["", "a b", "in()", "in(a", "in(a,)", "!!a", "(a)", "-a", "a_", "x" * 64, "in(a,!b)"]
)
@pytest.mark.parametrize("section", ["rollout", "reward_actors", "learner"])
def test_what_is_no_selector_is_refused_with_its_path(section, condition):
    with pytest.raises(ConfigError, match=rf"^{section}\.labels: pool: .* is no label selector; use value, !value"):
        resolve_config({section: {"labels": {"pool": condition}}})


@pytest.mark.parametrize("key", ["-a", "a b", "/a", "a/", "a/b/", "x" * 64])
def test_what_is_no_labels_name_is_refused(key):
    with pytest.raises(ConfigError, match=r"^learner\.labels: .* is no label's name"):
        resolve_config({"learner": {"labels": {key: "a"}}})


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"GPU": 1}, "GPU: is no custom resource; use the option for GPUs"),
        ({"disk": 0}, "disk: 0 is no amount; use a positive number"),
        ({"disk": float("inf")}, "disk: inf is no amount"),
        ({"disk": 1.5}, "disk: 1.5, but Ray takes only whole amounts above 1; use 1"),
    ],
)
def test_what_is_no_custom_resource_is_refused(resources, said):
    with pytest.raises(ConfigError, match=rf"^rollout\.resources: {said}"):
        resolve_config({"rollout": {"resources": resources}})


WORDS = st.from_regex(r"\A[a-zA-Z0-9_./()!, -]{1,12}\Z")


@given(key=WORDS, condition=WORDS)
def test_ray_takes_every_selector_that_is_taken(key, condition):
    try:
        config = resolve_config({"rollout": {"labels": {key: condition}}})
    except ConfigError:
        return
    assert validate_label_selector(config.rollout.labels) is None
    validate_node_label_syntax(dict.fromkeys(config.rollout.labels, "a"))
