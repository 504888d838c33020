"""One file per node and version: who writes it, who removes it, and what a death leaves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import pytest

from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import NotWritten
from ray_rl.weight_file import NodeWeightFile, sweep, sweep_dead

CONTENT = [memoryview(b"first "), memoryview(b"second")]
SPAWN = multiprocessing.get_context("spawn")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never() -> NoReturn:
    raise AssertionError("the file was there already")


def write_slowly(folder: Path, marks: Path, start: float) -> None:
    """A contender of the race: leaves a mark when it is the one that writes."""

    def chunks() -> Iterator[memoryview]:
        (marks / str(os.getpid())).touch()
        for chunk in CONTENT:
            time.sleep(0.2)
            yield chunk

    file = NodeWeightFile("race", folder)
    time.sleep(max(0.0, start - time.time()))
    assert file.ensure(1, chunks, timeout=20).read_bytes() == b"first second"


def write_and_wait(folder: Path, ready: Connection) -> None:
    NodeWeightFile("killed", folder).ensure(1, lambda: CONTENT, timeout=5)
    ready.send(True)
    time.sleep(60)


def die_while_writing(folder: Path) -> None:
    def chunks() -> Iterator[memoryview]:
        yield CONTENT[0]
        os.kill(os.getpid(), signal.SIGKILL)

    NodeWeightFile("broken", folder).ensure(1, chunks, timeout=5)


def test_of_two_processes_that_race_one_writes_and_both_read_the_whole(tmp_path: Path) -> None:
    folder, marks = tmp_path / "memory", tmp_path / "marks"
    folder.mkdir()
    marks.mkdir()
    owner = NodeWeightFile("race", folder)
    start = time.time() + 1.5
    racers = [SPAWN.Process(target=write_slowly, args=(folder, marks, start)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert len(names(marks)) == 1
    owner.close()
    assert names(folder) == []


def test_a_written_version_is_not_written_again(tmp_path: Path) -> None:
    file = NodeWeightFile("run", tmp_path)
    path = file.ensure(1, lambda: CONTENT, timeout=1)
    assert path.read_bytes() == b"first second"
    assert file.ensure(1, never, timeout=1) == path


def test_waiting_for_another_writer_ends_at_the_deadline(tmp_path: Path) -> None:
    slow, waiting = NodeWeightFile("run", tmp_path), NodeWeightFile("run", tmp_path)

    def chunks() -> Iterator[memoryview]:
        with pytest.raises(DeadlineExceeded, match="another process"):
            waiting.ensure(1, never, timeout=0.1)
        yield from CONTENT

    slow.ensure(1, chunks, timeout=1)


def test_a_version_is_written_into_the_memory_of_the_one_before_and_no_byte_of_it_is_left(tmp_path: Path) -> None:
    file = NodeWeightFile("run", tmp_path)
    first = file.ensure(1, lambda: CONTENT, timeout=1)
    place = first.stat().st_ino
    second = file.ensure(2, lambda: [memoryview(b"short")], timeout=1)
    assert second.read_bytes() == b"short"
    assert second.stat().st_ino == place
    assert not first.exists()
    file.close()
    assert names(tmp_path) == []


def test_the_version_written_last_stays_for_those_who_join_later(tmp_path: Path) -> None:
    writer, joiner = NodeWeightFile("run", tmp_path), NodeWeightFile("run", tmp_path)
    writer.ensure(1, lambda: CONTENT, timeout=1)
    assert joiner.path(1).read_bytes() == b"first second"
    assert joiner.ensure(1, never, timeout=1) == joiner.path(1)


def test_of_several_older_files_one_whole_one_is_written_over_and_the_rest_are_removed(tmp_path: Path) -> None:
    file, other = NodeWeightFile("run", tmp_path), NodeWeightFile("run-v2", tmp_path)
    place = file.ensure(1, lambda: CONTENT, timeout=1).stat().st_ino
    kept = other.ensure(1, lambda: CONTENT, timeout=1)
    for name in ("ray-rl-run-v3.partial", "ray-rl-run-v7.partial"):
        (tmp_path / name).write_bytes(b"half of it")
    assert file.ensure(3, lambda: CONTENT, timeout=1).stat().st_ino == place
    assert [name for name in names(tmp_path) if name.startswith("ray-rl-run-v") and name != "ray-rl-run-v3.bin"] == [
        kept.name,
        "ray-rl-run-v2.owners",
        "ray-rl-run-v2.writing",
    ]


def test_a_version_can_be_written_anew_in_its_place(tmp_path: Path) -> None:
    file = NodeWeightFile("run", tmp_path)
    place = file.ensure(1, lambda: CONTENT, timeout=1).stat().st_ino
    again = file.write(1, lambda descriptor: os.pwrite(descriptor, b"other", 0), timeout=1)
    assert again.read_bytes() == b"other"
    assert again.stat().st_ino == place


def test_remove_removes_one_version_and_may_be_repeated(tmp_path: Path) -> None:
    file = NodeWeightFile("run", tmp_path)
    path = file.ensure(1, lambda: CONTENT, timeout=1)
    file.remove(2)
    assert path.exists()
    file.remove(1)
    file.remove(1)
    assert not path.exists()


def test_identity_tells_who_sees_the_same_files(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first, same = NodeWeightFile("run", tmp_path), NodeWeightFile("run", tmp_path)
    assert first.identity == same.identity
    assert first.identity != NodeWeightFile("run", other).identity


def test_a_full_memory_is_one_clear_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = NodeWeightFile("run", tmp_path)

    def chunks() -> Iterator[memoryview]:
        yield CONTENT[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotWritten, match=r"^.*v1.bin: .*shared memory: No space left on device; .*$"):
        file.ensure(1, chunks, timeout=1)
    file.close()
    assert names(tmp_path) == []


def test_contents_that_do_not_come_in_time_are_no_fault_of_the_memory(tmp_path: Path) -> None:
    def chunks() -> Iterator[memoryview]:
        yield CONTENT[0]
        raise DeadlineExceeded("waited 1 s for a chunk")

    with pytest.raises(DeadlineExceeded, match="a chunk"):
        NodeWeightFile("run", tmp_path).ensure(1, chunks, timeout=1)


def test_the_last_user_of_a_run_removes_its_files(tmp_path: Path) -> None:
    first, last = NodeWeightFile("run", tmp_path), NodeWeightFile("run", tmp_path)
    path = first.ensure(1, lambda: CONTENT, timeout=1)
    first.close()
    assert path.exists()
    last.close()
    last.close()
    assert names(tmp_path) == []


def test_sweep_removes_a_run_in_use_and_no_other_run(tmp_path: Path) -> None:
    mine, other = NodeWeightFile("run", tmp_path), NodeWeightFile("run-v2", tmp_path)
    mine.ensure(1, lambda: CONTENT, timeout=1)
    kept = other.ensure(1, lambda: CONTENT, timeout=1)
    sweep("run", tmp_path)
    sweep("run", tmp_path)
    assert names(tmp_path) == sorted([kept.name, "ray-rl-run-v2.owners", "ray-rl-run-v2.writing"])


def test_files_of_a_killed_run_are_swept_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    ready, child_end = SPAWN.Pipe()
    process = SPAWN.Process(target=write_and_wait, args=(tmp_path, child_end))
    process.start()
    assert ready.poll(30)
    sweep_dead(tmp_path)
    assert "ray-rl-killed-v1.bin" in names(tmp_path)
    process.kill()
    process.join(10)
    survivor = NodeWeightFile("next", tmp_path)
    assert names(tmp_path) == ["ray-rl-next.owners"]
    survivor.close()


def test_after_a_writer_was_killed_the_next_one_writes_the_whole(tmp_path: Path) -> None:
    survivor = NodeWeightFile("broken", tmp_path)
    process = SPAWN.Process(target=die_while_writing, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert survivor.ensure(1, lambda: CONTENT, timeout=5).read_bytes() == b"first second"
    survivor.close()
    assert names(tmp_path) == []


def test_a_run_id_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run id"):
        NodeWeightFile("../run", tmp_path)
