"""Whatever a user hands in is taken, or refused in clear lines: never a traceback, never a hang, never a silent default.

Thousands of wrong recipes, data files and models go through what reads them before a run starts anything.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from actors.rewards import check_python_function
from ray_rl.config import ConfigError, RunConfig, load_config, resolve_config
from ray_rl.config.load import recipe_names, recipe_text
from ray_rl.config.task import DatasetTaskConfig, ReasoningGymTaskConfig
from ray_rl.embedded import policy_path
from ray_rl.model_files import check_model_folder
from ray_rl.prompt_stream import PromptStream, encode_problem
from ray_rl.tasks import make_task
from ray_rl.tokenizer import TokenizerCodec, load_tokenizer

ROWS = [{"prompt": f"{n}+1", "answer": str(n + 1), "level": n} for n in range(20)]


def some(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def faults(work: Callable[[], Any]) -> list[str]:
    """The lines with which a user's mistake ends; none when it is none. Any other error is the test's."""
    try:
        work()
    except ConfigError as error:
        lines = str(error).split("\n")
        for line in lines:
            assert line.isprintable()
            subject, colon, what = line.partition(": ")
            assert subject
            assert colon
            assert what.strip()
            assert len(line) < 10_000
        return lines
    return []


def fault(work: Callable[[], Any]) -> str:
    (line,) = faults(work)
    return line


# --- configurations


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every option."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in sections(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        for part in get_args(annotation):
            yield from sections(part)


OPTIONS = sorted(set(fields(RunConfig)))
ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    10**9,
    2**63,
    -(2**70),
    10**400,
    0.0,
    -0.5,
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
]
ODD_TEXTS = [
    "",
    " ",
    "nan",
    "embedded",
    "none",
    "auto",
    "~nobody/x",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 5000,
    "/",
    ".",
    "../..",
    "é\u2028",
]
KINDS = [
    "fixed",
    "adaptive",
    "vineppo",
    "grpo",
    "rloo",
    "python",
    "math",
    "dataset",
    "arithmetic",
    "reasoning_gym",
    "lines",
]
plain = (
    st.none()
    | st.booleans()
    | st.sampled_from(ODD_NUMBERS)
    | st.sampled_from([*ODD_TEXTS, *KINDS])
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
)
names = st.sampled_from(
    [*sorted({part for option in OPTIONS for part in option.split(".")}), "", "no_such", "a.b", "kind"]
)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | plain, inner, max_size=3), max_leaves=8
)


def nested(options: dict[str, Any]) -> dict[Any, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}, as far as it goes."""
    data: dict[Any, Any] = {}
    for option, value in options.items():
        *outer, last = option.split(".")
        inner = data
        for part in outer:
            following = inner.setdefault(part, {})
            inner = following if isinstance(following, dict) else {}
        inner[last] = value
    return data


def resolved(data: Any, overrides: list[str]) -> None:
    """What resolves is kept with the run and must resolve to the same."""
    config = resolve_config(data, overrides)
    kept = yaml.safe_dump(config.model_dump(mode="json"))
    assert resolve_config(yaml.safe_load(kept)) == config


@some(600)
@given(options=st.dictionaries(st.sampled_from(OPTIONS), values, max_size=5))
def test_any_value_of_any_option_resolves_or_is_refused(options):
    faults(lambda: resolved(nested(options), []))


@some(300)
@given(data=st.dictionaries(names | plain, values, max_size=4))
def test_any_mapping_resolves_or_is_refused(data):
    faults(lambda: resolved(data, []))


@some(400)
@given(
    overrides=st.lists(
        st.builds("{}={}".format, st.sampled_from(OPTIONS), plain | values) | st.text(max_size=20), max_size=4
    )
)
@example(["task=arithmetic?max_steps=!!int ''"])
@example(["seed=2020-13-45"])
@example(["seed=" + "9" * 5000])
@example(["seed=0x" + "f" * 5000])
@example([".".join("a" * 3000) + "=1"])
@example(["model.path=" + "[" * 3000])
@example(["rollout.num_actors={min: 3, max: 1}"])
def test_any_override_resolves_or_is_refused(overrides):
    faults(lambda: resolved({}, overrides))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("reward.failure=.nan", "reward.failure: nan is not a finite number; use one"),
        ("rollout.group_timeout=.inf", "rollout.group_timeout: inf is not a finite number; use one"),
        (
            "rollout.num_actors=many",
            "rollout.num_actors: Input should be a valid integer, unable to parse string as an",
        ),
        ("rollout.num_actors={min: 3, max: 1}", "rollout.num_actors: max: 1 is less than min = 3; swap them"),
        ("name=a/b", "name: 'a/b' cannot be part of a folder's name; use up to 100 characters without /"),
        ("model.path=", "model.path: Input should be a valid string (got None)"),
        ("model.path=''", "model.path: String should have at least 1 character (got '')"),
        ("model.path=~nobody_of_that_name/x", "model.path: ~nobody_of_that_name/x does not exist; give a folder in"),
        ("task.train_size=1000000000000", "task.train_size: Input should be less than or equal to 10000000 (got"),
        ("task.seed=2001-01-01", "task.seed: datetime.date(2001, 1, 1) is a date; put it in quotes to mean the text"),
        ("seed=18446744073709551616", "seed: a number of more than 64 bits; use a smaller one"),
        ("model={1: 2}", "model: 1 is no name of an option; use text, in quotes where YAML reads it otherwise"),
    ],
)
def test_what_looks_like_a_value_but_is_none_is_refused_with_its_path(override, line):
    assert fault(lambda: resolve_config({}, [override])).startswith(line)


def test_a_short_recipe_that_means_an_endless_one_is_refused(tmp_path):
    bomb = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    for text, said in ((bomb, "more than 20000 values"), ("task: &a [*a]", "nested deeper than 32 levels")):
        (tmp_path / "recipe.yaml").write_text(text)
        assert said in fault(lambda: load_config(str(tmp_path / "recipe.yaml")))


@some(300)
@given(content=st.binary(max_size=60) | st.text(alphabet="[]{}:,-&*!|>'\"#%@` \n\tab1~", max_size=40).map(str.encode))
@example(b"\xef\xbb\xbfseed: 1")
@example(b"[" * 3000)
@example(b"0")
@example(b"")
def test_any_recipe_file_resolves_or_is_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    faults(lambda: load_config(str(tmp_path / "recipe.yaml")))


@some(200)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(recipe_names()))
def test_any_shipped_recipe_with_a_hole_or_a_swap_in_it_resolves_or_is_refused(tmp_path, seed, name):
    dice = random.Random(seed)
    text = list(recipe_text(name))
    for _ in range(dice.randint(1, 6)):
        start = dice.randrange(len(text))
        text[start : start + dice.randint(0, 20)] = dice.choices("\0\t :{}[]-#'\"&*é9a\n", k=dice.randint(0, 3))
    (tmp_path / "recipe.yaml").write_text("".join(text))
    faults(lambda: load_config(str(tmp_path / "recipe.yaml")))


def test_a_recipe_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "huge.yaml").write_bytes(b"a" * (2**20 + 1))
    assert "a recipe is a text of a few KiB" in fault(lambda: load_config(str(tmp_path / "huge.yaml")))
    for odd in ("~nobody_of_that_name/x", "a\0b", "x" * 5000, "a\nb", "", str(tmp_path), "/dev/null"):
        assert fault(lambda: load_config(odd)).startswith("recipe: ")  # noqa: B023 (called at once)


# --- data sets


@pytest.fixture(scope="module")
def codec() -> TokenizerCodec:
    return load_tokenizer(str(policy_path()))


def prepared(codec: TokenizerCodec, path: Path, **options: Any) -> None:
    """What is read of the data before a run starts anything."""
    task = make_task(DatasetTaskConfig(path=str(path), **{"eval_path": str(path), **options}))
    encode = partial(encode_problem, codec, max_tokens=64)
    PromptStream(task.problems("train"), encode, seed=0, shuffle=True).check(1)
    for problem in task.problems("eval"):
        encode(problem, position=-1)


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue().to_pybytes()


def not_utf8_column() -> bytes:
    column = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "answer": column}), file)
    return file.getvalue().to_pybytes()


DATA = {
    "binary": ("a.jsonl", bytes(range(256)), "not UTF-8 text"),
    "a compressed file by another name": ("a.jsonl", gzip.compress(json_lines(ROWS)), "not UTF-8 text"),
    "a compressed file": ("a.jsonl.gz", gzip.compress(json_lines(ROWS))[:50], "is none of .jsonl, .json, .parquet"),
    "an empty file": ("a.jsonl", b"", "has no training rows"),
    "only line ends": ("a.jsonl", b"\n\r\n \n", "has no training rows"),
    "an empty list": ("a.json", b"[]", "has no training rows"),
    "an empty json file": ("a.json", b"", "has no training rows"),
    "an empty parquet file": ("a.parquet", b"", "not a parquet file"),
    "parquet without rows": ("a.parquet", parquet([])[:], "has no training rows"),
    "half a parquet file": ("a.parquet", parquet(ROWS)[:300], "not a parquet file"),
    "a parquet file without its end": ("a.parquet", parquet(ROWS)[:-5], "not a parquet file"),
    "text in parquet that is none": ("a.parquet", not_utf8_column(), "is not UTF-8"),
    "null bytes": ("a.jsonl", b"\0" * 100, "line 1: not valid JSON"),
    "half a line": ("a.jsonl", json_lines(ROWS)[:-5], "line 20: not valid JSON"),
    "half a list": ("a.json", json.dumps(ROWS).encode()[:-1], "not valid JSON"),
    "an endless list": ("a.json", b"[" * 100_000, "not valid JSON"),
    "an endless line": ("a.jsonl", b"{" + b'"a":{' * 100_000, "line 1: not valid JSON"),
    "an endless number": ("a.jsonl", b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    "rows that are lists": ("a.jsonl", json_lines([[1]]), "a row must be an object with columns, not list"),
    "rows that are text": ("a.json", b'["a"]', "a row must be an object with columns, not str"),
    "one object": ("a.json", b"3", "a row must be an object with columns, not int"),
    "a row without the column": ("a.jsonl", json_lines([*ROWS, {"answer": "1"}]), "row 20: no column 'prompt'"),
    "a row without an answer": ("a.jsonl", json_lines([*ROWS, {"prompt": "1"}]), "row 20: no column 'answer'"),
    "a null answer": (
        "a.jsonl",
        json_lines([*ROWS, {"prompt": "1", "answer": None}]),
        "row 20: column 'answer' must hold",
    ),
    "an answer that is nan": ("a.jsonl", b'{"prompt": "1", "answer": NaN}', "row 0: column 'answer' must hold"),
    "a prompt of another type": (
        "a.jsonl",
        json_lines([*ROWS, {"prompt": 3, "answer": "1"}]),
        "row 20: column 'prompt'",
    ),
    "messages of another type": (
        "a.jsonl",
        json_lines([{"prompt": [{"role": "user", "content": [{"text": "1"}]}], "answer": "1"}]),
        "row 0: column 'prompt' must hold text or messages",
    ),
    "messages without a template": (
        "a.jsonl",
        json_lines([{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]),
        "model.chat_template: the prompt is a list of messages",
    ),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud800", "answer": "1"}', "a lone surrogate"),
    "a prompt longer than the context": (
        "a.jsonl",
        json_lines([{"prompt": "1+" * 99, "answer": "1"}]),
        "has 198 tokens",
    ),
    "a huge line": ("a.jsonl", json_lines([{"prompt": "1+" * 10**7, "answer": "1"}]), "has 20000000 characters"),
    "an empty prompt": ("a.jsonl", json_lines([{"prompt": "", "answer": "1"}]), "must hold text or messages"),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_data_file_with_a_fault_is_refused_in_one_line(codec, tmp_path, kind):
    name, content, said = DATA[kind]
    (tmp_path / name).write_bytes(content)
    line = fault(lambda: prepared(codec, tmp_path / name, eval_path=None))
    assert said in line
    assert line.startswith(("task.", "model."))


def test_a_mark_at_the_begin_of_a_file_equal_prompts_and_equal_ids_are_no_faults(codec, tmp_path):
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json_lines([{**row, "id": 1} for row in [*ROWS, *ROWS]]))
        problems = make_task(DatasetTaskConfig(path=str(tmp_path / name))).problems("train")
        assert len({problem.problem_id for problem in problems}) == 40


def test_a_place_without_data_is_refused(codec, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "it has: no .jsonl, .json or .parquet file" in fault(lambda: prepared(codec, tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "is not a whole saved dataset" in fault(lambda: prepared(codec, tmp_path))
    (tmp_path / "dataset_dict.json").write_bytes(b"\xff")
    assert "is not a whole saved dataset" in fault(lambda: prepared(codec, tmp_path))
    for odd in (f"{tmp_path}/none", "~nobody_of_that_name/x", "x" * 5000 + ".jsonl", "/dev/null/x.jsonl", "a\0.jsonl"):
        assert fault(lambda: prepared(codec, Path(odd))).startswith("task.path: ")  # noqa: B023 (called at once)


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
rows = st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "a", ""]), cells, max_size=4) | cells, max_size=4)


@some(400)
@given(
    rows=rows,
    suffix=st.sampled_from([".jsonl", ".json"]),
    column=st.sampled_from(["prompt", "a.b", "", "prompt.a", "."]),
)
def test_any_rows_of_json_are_taken_or_refused(codec, tmp_path, rows, suffix, column):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(json.dumps(rows).encode() if suffix == ".json" else json_lines(rows))
    faults(lambda: prepared(codec, path, prompt_column=column or "a", eval_path=None))


@some(300)
@given(content=st.binary(max_size=80), suffix=st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_any_bytes_are_no_data(codec, tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert faults(lambda: prepared(codec, path))


@some(150)
@given(kept=st.integers(0, len(parquet(ROWS)) - 1))
def test_no_part_of_a_parquet_file_is_taken_for_the_whole(codec, tmp_path, kept):
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS)[:kept])
    assert faults(lambda: prepared(codec, tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("chain_sum", {"min_terms": "two"}),
        ("chain_sum", {"min_terms": None}),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}),
        ("chain_sum", {"min_digits": 0}),
        ("chain_sum", {"no_such": 1}),
        ("chain_sum", {"operators": [1]}),
        ("chain_sum", {"operators": []}),
        ("countdown", {"min_value": "a"}),
        ("no_such", {}),
        ("", {}),
    ],
)
def test_a_generator_with_wrong_options_is_refused(dataset, options):
    def made() -> None:
        config = ReasoningGymTaskConfig(dataset=dataset, options=options, train_size=4, eval_size=2)
        problems = make_task(config).problems("train")
        list(problems)

    assert fault(made).startswith(("task.options: ", "task.dataset: "))


# --- models


@pytest.fixture
def model(tmp_path) -> Path:
    """A model to spoil."""
    return Path(shutil.copytree(policy_path(), tmp_path / "model"))


def looked_at(folder: Path) -> None:
    """What is read of a model before a run starts anything."""
    check_model_folder(str(folder))
    codec = load_tokenizer(str(folder))
    codec.check_ends()
    encode_problem(codec, make_task(RunConfig().task).problems("train")[0], position=0, max_tokens=64)


def edit(file: Path, **changes: Any) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def forget_the_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "generation_config.json", eos_token_id=None)


def cut(name: str, kept: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept]) and None


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer (tokenizer.json, "),
    "an empty tokenizer": (cut("tokenizer.json", 0), "no tokenizer could be loaded from"),
    "half a tokenizer": (cut("tokenizer.json", 400), "no tokenizer could be loaded from"),
    "a tokenizer of nothing": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "no tokenizer could be loaded",
    ),
    "a list for a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        "no tokenizer could be loaded",
    ),
    "half a tokenizer config": (cut("tokenizer_config.json", 30), "no tokenizer could be loaded from"),
    "no end of sequence": (forget_the_end, "rollout.stop_token_ids: completions could never end"),
    "half a generation config": (cut("generation_config.json", 30), "no tokenizer could be loaded from"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json; give a folder"),
    "an empty config": (cut("config.json", 0), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "half the weights": (cut("model.safetensors", 10**5), "was cut off: it has 100000 of "),
    "empty weights": (cut("model.safetensors", 0), "is not a safetensors file with weights"),
    "nothing": (lambda folder: [file.unlink() for file in folder.iterdir()], "has no config.json"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_a_fault_is_refused_in_one_line(model, kind):
    spoil, said = MODELS[kind]
    looked_at(model)
    spoil(model)
    line = fault(lambda: looked_at(model))
    assert said in line
    assert line.startswith(("model.path: ", "rollout.stop_token_ids: "))


@some(60)
@given(
    name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]),
    content=st.binary(max_size=30) | cells.map(json.dumps).map(str.encode),
)
def test_any_bytes_in_a_models_small_files_are_taken_or_refused(model, name, content):
    whole = (model / name).read_bytes()
    (model / name).write_bytes(content)
    faults(lambda: looked_at(model))
    (model / name).write_bytes(whole)


@some(60)
@given(seed=st.integers(0, 10**6))
def test_any_swapped_part_of_a_tokenizer_is_taken_or_refused(model, seed):
    dice = random.Random(seed)
    whole = (model / "tokenizer.json").read_bytes()
    content = json.loads(whole)
    inner: Any = content
    while isinstance(inner, dict | list) and inner and (inner is content or dice.random() < 0.8):
        outer, key = inner, dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = outer[key]
    outer[key] = dice.choice([None, [], {}, "", "x", -1, 10**9, True, [[1]]])
    (model / "tokenizer.json").write_text(json.dumps(content))
    faults(lambda: looked_at(model))
    (model / "tokenizer.json").write_bytes(whole)


def test_a_context_that_the_model_does_not_have_and_a_prompt_that_does_not_fit_are_told_apart(model, codec):
    edit(model / "config.json", max_position_embeddings=64)
    given = {"model": {"path": str(model)}, "rollout": {"max_tokens": 48}}
    assert fault(lambda: resolve_config(given)).startswith("model.max_model_len: 256 exceeds the 64 positions of")
    problem = make_task(RunConfig().task).problems("train")[0]
    line = fault(lambda: encode_problem(codec, problem, position=0, max_tokens=3))
    assert line.startswith(f"model.max_model_len: the prompt of problem {problem.problem_id} has ")
    for odd in ("[]", "{", '{"max_position_embeddings": "many"}', "[" * 5000):
        (model / "config.json").write_text(odd)
        assert faults(lambda: resolve_config(given)) == []  # whoever reads the model tells


def test_a_model_that_lacks_weights_or_has_others_is_not_trained_with_random_ones(model):
    from safetensors.torch import load_file, save_file

    from learner.model import load_model
    from ray_rl.config.model import ModelConfig

    load_model(ModelConfig(), model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name][:-1].contiguous()}, model / "model.safetensors", {"format": "pt"})
    assert "is not loadable as a causal language model" in fault(lambda: load_model(ModelConfig(), model))
    del weights[name]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert f"lacks 1 of the model's weights ({name}, ...)" in fault(lambda: load_model(ModelConfig(), model))
    for changes in ({"model_type": "no_such"}, {"model_type": "llama", "hidden_size": "wide"}, {"hidden_size": 161}):
        edit(model / "config.json", **changes)
        assert "is not loadable as a causal language model" in fault(lambda: load_model(ModelConfig(), model))


# --- rewards


@some(200)
@given(source=st.text(max_size=30) | st.binary(max_size=30), function=st.sampled_from(["score", "é", "_"]))
@example("def score(a, b, c, d): pass", "score")
@example("def score(" + "a, " * 300 + "): pass", "score")
def test_any_file_has_a_usable_function_or_is_refused(tmp_path, source, function):
    (tmp_path / "mine.py").write_bytes(source if isinstance(source, bytes) else source.encode(errors="surrogatepass"))
    faults(lambda: check_python_function(f"{tmp_path / 'mine.py'}:{function}"))


# --- the command


def ray_rl(tmp_path: Path, *arguments: str) -> tuple[int, list[str], bool]:
    """Exit code, what it says, and whether it started a Ray."""
    ray_folder = Path("/tmp") / f"bad-input-{os.getpid()}"  # Ray's sockets need a short path
    ray_folder.mkdir(exist_ok=True)
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ray_rl", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        return done.returncode, done.stderr.splitlines(), any(ray_folder.iterdir())
    finally:
        shutil.rmtree(ray_folder)


REFUSED: dict[str, Callable[[Path, Path], list[str]]] = {
    "a binary recipe": lambda folder, _: [str(folder / "binary.yaml")],
    "a recipe with a tab": lambda folder, _: [str(folder / "tab.yaml")],
    "a value of the wrong type": lambda folder, _: ["laptop-grpo", "training.steps=[1]"],
    "a number that is none": lambda folder, _: ["laptop-grpo", "reward.failure=.nan"],
    "binary data": lambda folder, _: ["laptop-grpo", f"task={folder / 'binary.jsonl'}"],
    "half a data file": lambda folder, _: ["laptop-grpo", f"task={folder / 'half.parquet'}"],
    "a dataset that cannot be fetched": lambda folder, _: ["laptop-grpo", "task=no-such-owner/no-such-data"],
    "half the weights": lambda folder, model: [
        "laptop-grpo",
        f"model.path={model}",
        cut("model.safetensors", 999)(model) or "seed=1",
    ],
    "no tokenizer": lambda folder, model: [
        "laptop-grpo",
        f"model.path={model}",
        (model / "tokenizer.json").unlink() or "seed=1",
    ],
    "no end of sequence": lambda folder, model: [
        "laptop-grpo",
        f"model.path={model}",
        forget_the_end(model) or "seed=1",
    ],
    "no such function": lambda folder, _: [
        "laptop-grpo",
        "reward.kind=python",
        f"reward.function={folder / 'mine.py'}:other",
    ],
    "no such file": lambda folder, _: [
        "laptop-grpo",
        "reward.kind=python",
        f"reward.function={folder / 'none.py'}:score",
    ],
}


@pytest.mark.integration
@pytest.mark.parametrize("kind", REFUSED)
def test_train_refuses_in_one_line_with_exit_code_2_before_it_starts_anything(model, tmp_path, kind):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "tab.yaml").write_text("seed:\n\t1\n")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "half.parquet").write_bytes(parquet(ROWS)[:-9])
    (tmp_path / "mine.py").write_text("def score(prompt, completion, answer, metadata): return 1.0\n")
    arguments = REFUSED[kind](tmp_path, model)
    code, said, started = ray_rl(tmp_path, "train", *arguments, "--run-dir", str(tmp_path / "run"))
    errors = [line for line in said if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), said
    assert "Traceback" not in "\n".join(said)
    assert not started
    assert not (tmp_path / "run").exists()
