"""Rows as problems: files, folders, saved datasets; columns by dotted path; one line per fault."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ray_rl.config import ConfigError
from ray_rl.config.task import ArithmeticTaskConfig, DatasetTaskConfig
from ray_rl.tasks import make_task

ROWS = [{"prompt": f"{n}+1", "answer": str(n + 1), "level": n} for n in range(5)]
HELD_OUT = [{"prompt": f"{n}+2", "answer": str(n + 2), "level": n} for n in range(3)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(path: Path, **changes):
    return make_task(DatasetTaskConfig(path=str(path), **changes))


def prompts(problems) -> list:
    return [problem.prompt for problem in problems]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files_of_each_kind_read_alike(tmp_path, suffix):
    train, held_out = write(tmp_path / f"a{suffix}", ROWS), write(tmp_path / f"b{suffix}", HELD_OUT)
    source = task(train, eval_path=str(held_out))
    problems = source.problems("train")
    assert prompts(problems) == [row["prompt"] for row in ROWS]
    assert (problems[2].problem_id, problems[2].answer, problems[2].metadata) == ("a:train:2", "3", {"level": 2})
    assert prompts(source.problems("eval")) == [row["prompt"] for row in HELD_OUT]


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(task(path).problems("train")) == 5


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("data/train-0.parquet", "data/test-0.parquet")])
def test_a_folder_has_its_splits_in_the_names_of_its_files(tmp_path, names):
    write(tmp_path / names[0], ROWS)
    write(tmp_path / names[1], HELD_OUT)
    assert len(task(tmp_path).problems("train")) == 5
    assert len(task(tmp_path).problems("eval")) == 3


def test_shards_and_folders_of_a_split_are_joined_and_other_names_left_out(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:2])
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[2:])
    write(tmp_path / "training_notes.jsonl", [{"other": 1}])
    write(tmp_path / "held" / "rows.jsonl", HELD_OUT)
    source = task(tmp_path, eval_split="held")
    assert prompts(source.problems("train")) == [row["prompt"] for row in ROWS]
    assert len(source.problems("eval")) == 3


def test_a_saved_dataset_is_read(tmp_path):
    import datasets

    saved = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(HELD_OUT)}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "both"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    assert len(task(tmp_path / "both").problems("train")) == 5
    assert len(task(tmp_path / "both").problems("eval")) == 3
    assert len(task(tmp_path / "one").problems("train")) == 5
    with pytest.raises(ConfigError, match=r"^task\.eval_split: no split 'dev' in .*; it has: train, test$"):
        task(tmp_path / "both", eval_split="dev").problems("eval")
    with pytest.raises(ConfigError, match=r"^task\.eval_path: .* one dataset without splits"):
        task(tmp_path / "one").problems("eval")


def test_columns_are_found_by_dotted_path_and_what_is_left_is_metadata(tmp_path):
    row = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"style": "rule", "ground_truth": 2}}
    path = write(tmp_path / "a.parquet", [row])
    (problem,) = task(
        path, answer_column="reward_model.ground_truth", prompt_prefix="Q: ", prompt_suffix=" = ?"
    ).problems("train")
    assert problem.prompt == [{"role": "user", "content": "Q: 1+1 = ?"}]
    assert problem.answer == "2"
    assert problem.metadata == {"reward_model": row["reward_model"]}


def test_the_answer_is_what_follows_the_last_marker_and_the_solution_stays_in_the_metadata(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "?", "answer": "#### is a marker\n#### 1,234 "}])
    (problem,) = task(path, prompt_column="question", answer_marker="####").problems("train")
    assert problem.answer == "1,234"
    assert problem.metadata == {"answer": "#### is a marker\n#### 1,234 "}


def test_a_verifier_may_need_no_answer(tmp_path):
    (problem,) = task(write(tmp_path / "a.jsonl", [{"prompt": "?", "tests": [1]}]), answer_column=None).problems(
        "train"
    )
    assert problem.answer == ""
    assert problem.metadata == {"tests": [1]}


def test_evaluation_rows_that_occur_in_training_are_dropped_and_counted(tmp_path, caplog):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [ROWS[1], *HELD_OUT, ROWS[4]])
    assert prompts(task(tmp_path).problems("eval")) == [row["prompt"] for row in HELD_OUT]
    assert "dropped 2 evaluation rows" in caplog.text


def test_limits_keep_the_first_rows(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [ROWS[0], *HELD_OUT])
    source = task(tmp_path, train_limit=2, eval_limit=2)
    assert prompts(source.problems("train")) == ["0+1", "1+1"]
    assert prompts(source.problems("eval")) == ["0+2", "1+2"]


FAULTS = {
    "column": ({"a": {"b": 1}, "c": 2}, {}, r"^task\.prompt_column: row 0: no column 'prompt'; it has: a, a\.b, c$"),
    "dotted": (ROWS[0], {"answer_column": "x.y"}, r"^task\.answer_column: row 0: no column 'x\.y'; it has: prompt, "),
    "type": ({"prompt": 3, "answer": ""}, {}, r"^task\.prompt_column: row 0: .* must hold text or messages .* not 3$"),
    "nothing": ({}, {}, r"^task\.prompt_column: row 0: no column 'prompt'; it has: nothing$"),
    "surrogate": ({"prompt": "a\ud800", "answer": ""}, {}, r"^task\.prompt_column: row 0: .* lone surrogate"),
    "nan": ({"prompt": "?", "answer": float("nan")}, {}, r"^task\.answer_column: row 0: .* not nan"),
    "null": ({"prompt": "?", "answer": None}, {}, r"^task\.answer_column: row 0: .* not None"),
    "role": ({"prompt": [{"content": "x"}], "answer": ""}, {}, r"^task\.prompt_column: row 0: "),
    "empty": ({"prompt": "", "answer": ""}, {}, r"^task\.prompt_column: row 0: "),
    "answer": ({"prompt": "?", "answer": [1]}, {}, r"^task\.answer_column: row 0: .*answer_column: null"),
    "marker": (ROWS[0], {"answer_marker": "####"}, r"^task\.answer_marker: row 0: no '####' in the answer '1'$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_columns_is_one_line_with_its_path(tmp_path, fault):
    row, changes, message = FAULTS[fault]
    with pytest.raises(ConfigError, match=message) as error:
        task(write(tmp_path / "a.jsonl", [row]), **changes).problems("train")
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{oops\n')
    with pytest.raises(ConfigError, match=r"^task\.path: .*a\.jsonl line 2: not valid JSON"):
        task(tmp_path / "a.jsonl").problems("train")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"b\.jsonl line 1: a row must be an object with columns, not list"):
        task(tmp_path / "b.jsonl").problems("train")


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match=r"^task\.path: .*a\.parquet: not a parquet file"):
        task(tmp_path / "a.parquet").problems("train")


def test_what_is_not_there_is_named_with_the_mend(tmp_path):
    with pytest.raises(ConfigError, match=r"^task\.path: .*none\.jsonl does not exist"):
        task(tmp_path / "none.jsonl").problems("train")
    write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"^task\.eval_path: .* is one file without splits"):
        task(tmp_path / "a.jsonl").problems("eval")
    with pytest.raises(ConfigError, match=r"^task\.train_split: no file of split 'train' in .*; it has: a\.jsonl$"):
        task(tmp_path).problems("train")
    (tmp_path / "c.csv").touch()
    with pytest.raises(ConfigError, match=r"^task\.path: .*c\.csv is none of \.jsonl, \.json, \.parquet"):
        task(tmp_path / "c.csv").problems("train")


def test_no_rows_are_a_fault(tmp_path):
    write(tmp_path / "train.jsonl", [])
    with pytest.raises(ConfigError, match=r"^task\.path: .* has no training rows"):
        task(tmp_path).problems("train")
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:2])
    with pytest.raises(ConfigError, match=r"^task\.eval_split: no evaluation row is left \(2 rows, 2 of them"):
        task(tmp_path).problems("eval")


def test_a_hub_dataset_is_asked_for_by_name_subset_and_split_and_runs_no_code(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*given, **named):
        asked.append((given, named))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(make_task(DatasetTaskConfig(path="openai/gsm8k", subset="main")).problems("train")) == 5
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def test_a_hub_that_cannot_be_reached_is_the_users_fault_in_one_line(monkeypatch):
    import datasets

    def load_dataset(*given, **named):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"^task\.path: no/such is neither a local path nor .*: Couldn't reach the Hub$"
    ):
        make_task(DatasetTaskConfig(path="no/such")).problems("train")


def test_the_built_in_task_is_made_from_its_section():
    source = make_task(ArithmeticTaskConfig(min_steps=2, max_steps=2, train_size=7, eval_size=5))
    assert len(source.problems("train")) == 7
    with pytest.raises(ConfigError, match=r"^task: eval_size="):
        make_task(ArithmeticTaskConfig(min_steps=1, max_steps=1, eval_size=500))
