"""What lands on disk, also after an interruption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_rl.config.orchestration import LoggingConfig
from ray_rl.errors import NotWritten
from ray_rl.sinks import JsonlSink, ManySinks, TensorBoardSink, logged_metrics, make_sink, write_line
from tests.little_room import with_little_room


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_on_disk_before_the_sink_is_closed(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": 0.5})
    assert rows(tmp_path / "m.jsonl") == [{"step": 1, "a": 0.5}]


def test_the_same_step_again_adds_to_its_line(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": 1.0})
    sink.log(2, {"a": 2.0, "b": 3.0})
    sink.log(2, {"eval/pass@1": 0.5})
    sink.log(3, {"a": 4.0})
    assert rows(tmp_path / "m.jsonl") == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0, "b": 3.0, "eval/pass@1": 0.5},
        {"step": 3, "a": 4.0},
    ]


def test_a_resumed_run_takes_back_what_its_checkpoint_does_not_hold(tmp_path):
    path = tmp_path / "m.jsonl"
    first = JsonlSink(path)
    for step in range(6):
        first.log(step, {"a": step})
    first.close()
    second = JsonlSink(path, resume_step=3)
    second.log(4, {"a": 40.0})
    assert [(row["step"], row["a"]) for row in rows(path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40.0)]


def test_a_resumed_run_can_still_add_to_the_step_it_resumed_from(tmp_path):
    path = tmp_path / "m.jsonl"
    first = JsonlSink(path)
    first.log(1, {"a": 1.0})
    first.log(2, {"a": 2.0})
    first.close()
    JsonlSink(path, resume_step=2).log(2, {"b": 5.0})
    assert rows(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}]


def test_a_line_that_was_cut_short_is_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a')
    JsonlSink(path, resume_step=5).log(2, {"a": 2.0})
    assert rows(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": float("nan"), "b": float("inf")})
    assert rows(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None}]


def test_tensorboard_reads_the_scalars_back_and_hides_the_steps_that_were_done_again(tmp_path):
    first = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": float(step)})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=1)
    second.log(2, {"reward/mean": 20.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_can_be_switched_off(tmp_path):
    make_sink(tmp_path, LoggingConfig(tensorboard=False)).log(1, {"a": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_does_not_bring_torch_into_the_driver(tmp_path):
    program = (
        "import sys; from pathlib import Path; from ray_rl.sinks import TensorBoardSink\n"
        f"sink = TensorBoardSink(Path({str(tmp_path)!r})); sink.log(1, {{'a': 1.0}}); sink.close()\n"
        "sys.exit(bool({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_metrics_of_a_step_can_be_read_back(tmp_path):
    assert logged_metrics(tmp_path / "m.jsonl", 0) == {}
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(0, {"eval/pass@1": 0.25, "b": float("nan")})
    sink.log(1, {"a": 1.0})
    assert logged_metrics(tmp_path / "m.jsonl", 0) == {"eval/pass@1": 0.25}
    assert logged_metrics(tmp_path / "m.jsonl", 2) == {}


GARBAGE = [
    b'{"step": 3, "a',
    b"\x89PNG\r\n\x1a\n\x00\xff",
    b"[1, 2]\n",
    b'{"a": 1}\n',
    b'{"step": null}\n',
    b"\n",
    b"[" * 9999 + b"\n",
]


@pytest.mark.parametrize("tail", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("steps", [0, 2])
def test_whatever_an_accident_left_is_cut_and_the_good_lines_before_it_stay(tmp_path, steps, tail):
    path = tmp_path / "m.jsonl"
    good = [{"step": step, "a": 0.5} for step in range(1, steps + 1)]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in good) + tail)
    assert logged_metrics(path, 2) == ({"a": 0.5} if steps else {})
    sink = JsonlSink(path, resume_step=9)
    assert rows(path) == good
    sink.log(9, {"a": 1.0})
    assert rows(path) == [*good, {"step": 9, "a": 1.0}]


def test_lines_after_a_broken_one_are_cut_too(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a"\n{"step": 3}\n')
    JsonlSink(path, resume_step=3)
    assert rows(path) == [{"step": 1}]


def test_what_was_logged_after_a_step_can_be_taken_back_amid_the_run(tmp_path):
    sink = make_sink(tmp_path, LoggingConfig())
    for step in (1, 2, 3):
        sink.log(step, {"a": float(step)})
    sink.rewind(1)
    sink.log(1, {"eval/pass@1": 0.5})
    sink.log(2, {"a": 20.0})
    sink.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0, "eval/pass@1": 0.5}, {"step": 2, "a": 20.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 20.0)]


def test_all_can_be_taken_back(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"a": 1.0})
    sink.rewind(0)
    sink.log(1, {"b": 1.0})
    assert rows(tmp_path / "m.jsonl") == [{"step": 1, "b": 1.0}]


def test_a_full_disk_is_said_with_the_file():
    with pytest.raises(NotWritten, match=r"^/dev/full: could not be written: No space left on device; make room there"):
        write_line(Path("/dev/full"), {"step": 1})


def test_what_finds_no_room_leaves_the_lines_that_are_there_whole(tmp_path):
    said = with_little_room(
        tmp_path,
        """
        from ray_rl.sinks import JsonlSink
        sink = JsonlSink(Path("m.jsonl"))
        try:
            for step in range(1, 9): sink.log(step, {"a" * 900: 1.0})
        except NotWritten as error: print(error)
        try: sink.log(step - 1, {"b" * 900: 1.0})
        except NotWritten as error: print(error)
        """,
    )
    assert [line.partition(";")[0] for line in said.splitlines()] == [
        "m.jsonl: could not be written: File too large"
    ] * 2
    assert rows(tmp_path / "m.jsonl") == [{"step": step, "a" * 900: 1.0} for step in range(1, 5)]


def test_tensorboard_on_a_full_disk_is_said_and_nobody_waits_for_its_thread(tmp_path):
    said = with_little_room(
        tmp_path,
        """
        from ray_rl.sinks import TensorBoardSink
        sink = TensorBoardSink(Path("events"))
        try:
            for step in range(1000): sink.log(step, {"a": 1.0})
        except NotWritten as error: print(error)
        try: sink.close()
        except NotWritten as error: print(error)
        """,
    )
    assert said.startswith("events/events.out.tfevents.")
    assert "could not be written: File too large" in said


def test_every_sink_is_closed_also_when_one_finds_no_room(tmp_path):
    class Sink(JsonlSink):
        def __init__(self, path: Path, *, is_full: bool) -> None:
            super().__init__(path)
            self.is_full = is_full
            self.is_closed = False

        def close(self) -> None:
            self.is_closed = True
            if self.is_full:
                raise NotWritten("full")

    sinks = [Sink(tmp_path / str(index), is_full=index == 1) for index in range(3)]
    with pytest.raises(NotWritten, match="full"):
        ManySinks(sinks).close()
    assert all(sink.is_closed for sink in sinks)
