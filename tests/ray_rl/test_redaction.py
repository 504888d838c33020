"""What counts as a secret, and that it is nowhere afterwards."""

import logging

import pytest

from ray_rl.config import resolve_config
from ray_rl.errors import ConfigError
from ray_rl.redaction import MASK, RedactingFormatter, redact, redacted, refuse_secrets, secrets

SENTINEL = "sentinel-5f1c9a"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SENTINEL)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "my_secret",
        "APIKEY",
        "SSH_KEY",
        "PROXY_API_KEYS",
        "DB_PASS",
        "MYSQL_PWD",
        "GITHUB_PAT",
        "AZURE_STORAGE_CONNECTION_STRING",
    ],
)
def test_a_variable_with_a_name_like_these_holds_a_secret(name):
    assert secrets({name: "long enough"}) == {"long enough": name}


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "KEYBOARD",
        "HOME",
        "OLD_PWD",
    ],
)
def test_a_variable_with_a_name_like_these_holds_none(name):
    assert secrets({name: "long enough"}) == {}


def test_what_is_too_short_to_guard_anything_is_no_secret():
    assert secrets({"API_KEY": "dummy", "TOKEN": ""}) == {}


def test_the_longest_secret_is_masked_first(monkeypatch):
    monkeypatch.setenv("OTHER_TOKEN", f"{SENTINEL}-and-more")
    assert redact(f"a {SENTINEL}-and-more b {SENTINEL}") == f"a {MASK} b {MASK}"


def test_each_line_of_a_secret_is_one(monkeypatch):
    monkeypatch.setenv("PRIVATE_KEY", "first-part-of-it\nother-part-of-it\n")
    assert redact("got other-part-of-it") == f"got {MASK}"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pass@host/x", f"https://{MASK}@host/x"),
        ("https://me:p@ss@host/x", f"https://{MASK}@host/x"),
        ("https://me:p?ss@host/x", f"https://{MASK}@host/x"),
        ("https://me:p/ss@host/x", f"https://{MASK}@host/x"),
        ("http://host:8265/a@b", "http://host:8265/a@b"),
        ("http://host:8265?mail=a@b", "http://host:8265?mail=a@b"),
        ("http://me:pass@host?mail=a@b", f"http://{MASK}@host?mail=a@b"),
        ("s3://bucket/a?X-Amz-Signature=abc&b=1", f"s3://bucket/a?X-Amz-Signature={MASK}&b=1"),
        ("http://host:8265/x", "http://host:8265/x"),
        ("ssh://git@host/x", "ssh://git@host/x"),
    ],
)
def test_passwords_in_urls_are_masked(text, masked):
    assert redact(text) == masked


def test_data_is_masked_at_any_depth():
    data = {"a": [{"b": f"x {SENTINEL}"}], "api_key": "abc", "pad_token": "<pad>", "n": 3}
    assert redacted(data) == {"a": [{"b": f"x {MASK}"}], "api_key": MASK, "pad_token": "<pad>", "n": 3}


def test_a_record_is_masked_with_its_arguments_and_its_traceback():
    try:
        raise ValueError(SENTINEL)
    except ValueError as error:
        trace = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "told %s", (SENTINEL,), trace)
    text = RedactingFormatter().format(record)
    assert SENTINEL not in text
    assert text.count(MASK) >= 2


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        ({"learner": {"deepspeed": {"comms": {"api_key": "abc"}}}}, "learner.deepspeed.comms.api_key: is called like"),
        ({"task": {"kind": "reasoning_gym", "options": {"token": "abc"}}}, "task.options.token: is called like"),
        ({"name": f"run-{SENTINEL}"}, "name: holds the value of HF_TOKEN"),
        ({"model": {"path": "https://me:pass@hub/model"}}, "model.path: holds a password in a URL"),
        ({"values": [1, {"password": "x"}]}, "values.1.password: is called like"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_telling_it(recipe, where):
    with pytest.raises(ConfigError) as refusal:
        resolve_config(recipe)
    assert str(refusal.value).startswith(where)
    assert "set it in the environment" in str(refusal.value)
    assert SENTINEL not in str(refusal.value)
    assert "pass@" not in str(refusal.value)


def test_a_recipe_may_speak_of_tokens():
    refuse_secrets(
        {"rollout": {"max_tokens": 3, "stop_token_ids": [1]}, "pad_token": "<pad>", "eos_token": "", "token": ""}
    )
