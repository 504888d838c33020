"""Recorded groups read back as what was sampled."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from ray_rl.errors import NotWritten
from ray_rl.recorder import GroupRecorder, read_groups
from ray_rl.types import Continuation, GroupCost, Reward, StateValue, Trajectory, TrajectoryGroup
from tests.fakes import completion, problem, prompt, summary


class Words:
    """Token 1 is "a ", token 2 is "bb\\n", token 0 (the end) has no text."""

    def decode_with_offsets(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        pieces = [{0: "", 1: "a ", 2: "bb\n"}[token] for token in token_ids]
        return "".join(pieces), tuple(sum(map(len, pieces[:index])) for index in range(len(pieces)))


def group() -> TrajectoryGroup:
    values = (
        StateValue(boundary=0, mean=0.5, stderr=0.2, count=3),
        StateValue(boundary=2, mean=math.nan, stderr=math.inf, count=0),
    )
    good = Trajectory(
        completion=completion((1, 2, 1, 0)),
        text="a bb\na ",
        reward=Reward(value=1.0, parts={"exact": 1.0}),
        boundaries=(0, 2, 4),
        values=values,
    )
    failed = Trajectory(
        completion=completion((2,), finished=False),
        text="bb\n",
        reward=Reward(value=0.0, failure="timeout after 5.0 s"),
        boundaries=(0, 1),
        values=(),
    )
    continuation = Continuation(trajectory=0, boundary=2, completion=completion((1, 0)), reward=Reward(value=1.0))
    cost = GroupCost(
        primary_tokens=5,
        prompt_tokens=6,
        cached_prompt_tokens=0,
        continuations=1,
        continuation_tokens=2,
        states=2,
        closed_states=0,
        rounds=0,
        prefix_tokens=5,
        cacheable_prefix_tokens=0,
        cached_prefix_tokens=0,
        seconds=0.1,
    )
    return TrajectoryGroup(prompt=prompt(4), trajectories=(good, failed), continuations=(continuation,), cost=cost)


def test_a_written_group_reads_back(tmp_path):
    recorder = GroupRecorder(tmp_path / "groups.jsonl", 2, Words())
    recorder.write(7, group(), [(0.5, 0.5, -1.0, -1.0), None])
    (line,) = read_groups(tmp_path / "groups.jsonl")
    assert (line["step"], line["problem_id"], line["prompt"], line["answer"]) == (7, "p4", "1+1:", "2")
    good, failed = line["trajectories"]
    assert good["tokens"] == ["a ", "bb\n", "a ", ""]
    assert good["segments"] == ["a bb\n", "a "]
    assert good["token_ids"] == [1, 2, 1, 0]
    assert good["boundaries"] == [0, 2, 4]
    assert good["advantages"] == [0.5, 0.5, -1.0, -1.0]
    assert good["values"][0] == {"boundary": 0, "mean": 0.5, "stderr": 0.2, "count": 3, "closed": False}
    assert good["versions"] == [[0, 0, 4]]
    assert len(good["behavior_logprobs"]) == 4
    assert failed["failure"] == "timeout after 5.0 s"
    assert failed["advantages"] is None
    assert failed["finish_reason"] == "length"
    (continuation,) = line["continuations"]
    assert (continuation["trajectory"], continuation["boundary"], continuation["text"]) == (0, 2, "a ")
    assert continuation["reward"] == 1.0


def test_an_unknown_value_is_null_and_the_line_is_strict_json(tmp_path):
    GroupRecorder(tmp_path / "groups.jsonl", 2, Words()).write(1, group(), [(0.0,) * 4, None])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / "groups.jsonl").read_text(), parse_constant=refuse)
    assert line["trajectories"][0]["values"][1] == {
        "boundary": 2,
        "mean": None,
        "stderr": None,
        "count": 0,
        "closed": False,
    }


def test_advantages_must_fit_the_tokens(tmp_path):
    recorder = GroupRecorder(tmp_path / "groups.jsonl", 2, Words())
    with pytest.raises(ValueError, match="3 advantages for 4 tokens"):
        recorder.write(1, group(), [(0.0,) * 3, None])
    with pytest.raises(ValueError, match="zip"):
        recorder.write(1, group(), [(0.0,) * 4])


def test_the_best_and_the_worst_groups_are_kept_first(tmp_path):
    rewards = [(0.5, 0.5), (1.0, 1.0), (0.0, 0.0), (0.0, 0.5)]
    summaries = [summary(index, rewards=pair) for index, pair in enumerate(rewards)]

    def chosen(count: int) -> list[int]:
        return GroupRecorder(tmp_path / "g", count, Words()).choose(summaries)

    assert chosen(0) == []
    assert chosen(1) == [1]
    assert chosen(2) == [1, 2]
    assert chosen(3) == [1, 2, 0]
    assert chosen(9) == [1, 2, 0, 3]


def test_a_resumed_run_takes_back_groups_of_later_steps(tmp_path):
    path = tmp_path / "groups.jsonl"
    recorder = GroupRecorder(path, 2, Words())
    for step in (1, 1, 2, 3):
        recorder.write(step, group(), [(0.0,) * 4, None])
    GroupRecorder(path, 2, Words(), resume_step=2)
    assert [line["step"] for line in read_groups(path)] == [1, 1, 2]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert [line["step"] for line in read_groups(path)] == [1]


def test_groups_of_undone_steps_are_taken_back_amid_the_run(tmp_path):
    path = tmp_path / "groups.jsonl"
    recorder = GroupRecorder(path, 2, Words())
    for step in (1, 2, 2, 3):
        recorder.write(step, group(), [(0.0,) * 4, None])
    recorder.rewind(1)
    recorder.write(2, group(), [(0.0,) * 4, None])
    assert [line["step"] for line in read_groups(path)] == [1, 2]


@pytest.mark.parametrize("tail", [b'{"step": 2, "prompt": "\xc3', b"\x00\xff\xfe", b"\xff\n", b""])
def test_whatever_an_accident_left_is_cut_when_the_run_goes_on(tmp_path, tail):
    path = tmp_path / "groups.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    if not tail.endswith(b"\n"):
        assert [line["step"] for line in read_groups(path)] == [1]
    GroupRecorder(path, 2, Words(), resume_step=5).write(2, group(), [(0.0,) * 4, None])
    assert [line["step"] for line in read_groups(path)] == [1, 2]


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(NotWritten, match=r"groups\.jsonl: could not be written: No such file or directory"):
        GroupRecorder(tmp_path / "gone" / "groups.jsonl", 2, Words()).write(1, group(), [(0.0,) * 4, None])


def test_text_that_no_encoding_has_reads_back(tmp_path):
    lone = replace(group(), prompt=replace(prompt(4), problem=problem("p4", "half a pair: \ud800 é")))
    recorder = GroupRecorder(tmp_path / "groups.jsonl", 2, Words())
    recorder.write(1, lone, [(0.0,) * 4, None])
    (line,) = read_groups(tmp_path / "groups.jsonl")
    assert line["prompt"] == "half a pair: \ud800 é"
