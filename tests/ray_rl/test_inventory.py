"""A folder that was written down and one that an accident changed are told apart."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_rl.inventory import (
    MANIFEST,
    Damaged,
    Unreadable,
    damage,
    read_manifest,
    take,
    write_atomically,
    write_manifest,
)
from ray_rl.weight_manifest import digest_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"a": b"first", "sub/b": b"x" * 9_000_000, "sub/deep/c": b"", "d ä": b"last"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST).write_text("{}")
    return tmp_path


def test_every_file_but_the_manifest_is_listed_with_its_size(folder):
    files = take(folder, sync=True)
    assert {name: entry.bytes for name, entry in files.items()} == {
        "a": 5,
        "d ä": 4,
        "sub/b": 9_000_000,
        "sub/deep/c": 0,
    }
    assert damage(folder, files) is None


def test_a_digest_is_that_of_the_content_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"same")
    first, second = take(tmp_path).values()
    assert first == second
    assert first.xxh3 == digest_bytes(b"same")


def change_nothing_in_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-12]), "sub/b is 12 bytes shorter than it was written"),
        (lambda path: path.write_bytes(path.read_bytes() + b"!"), "sub/b is 1 bytes longer than it was written"),
        (Path.unlink, "sub/b is missing"),
        (change_nothing_in_size, "sub/b is not what was written"),
    ],
)
def test_an_accident_is_named_with_its_file(folder, accident, said):
    files = take(folder)
    accident(folder / "sub/b")
    assert damage(folder, files) == said


@pytest.mark.skipif(sys.platform != "linux", reason="a file that gives an input/output error is one of Linux's")
def test_what_the_system_does_not_let_be_read_is_not_called_damaged(folder):
    files = take(folder)
    for path in (folder / "sub/deep/c", folder / MANIFEST):
        path.unlink()
        path.symlink_to("/proc/self/mem")  # of size 0, and nothing can be read at its beginning
    with pytest.raises(Unreadable, match=r"/c: cannot be read: Input/output error; try again .* or move [^ ]+ away"):
        damage(folder, files)
    with pytest.raises(Unreadable, match=rf"{MANIFEST}: cannot be read: Input/output error"):
        read_manifest(folder)


def test_of_many_faults_the_first_few_are_named(tmp_path):
    for index in range(5):
        (tmp_path / f"f{index}").touch()
    files = take(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert damage(tmp_path, files) == "f0 is missing, f1 is missing, f2 is missing, and 2 more"


def test_a_folder_in_place_of_a_file_is_no_traceback(folder):
    files = take(folder)
    (folder / "sub/deep/c").unlink()
    (folder / "sub/deep/c").mkdir()
    assert "sub/deep/c" in (damage(folder, files) or "")


def test_more_files_than_were_written_do_no_harm(folder):
    files = take(folder)
    (folder / "notes.txt").write_text("mine")
    assert damage(folder, files) is None


def test_a_manifest_reads_back(folder):
    files = take(folder)
    write_manifest(folder, {"step": 3, "pending": (1, 2), "name": "ä"}, files)
    assert read_manifest(folder) == ({"step": 3, "pending": [1, 2], "name": "ä"}, files)


def test_a_manifest_of_an_older_version_lists_no_files(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"step": 3}))
    assert read_manifest(tmp_path) == ({"step": 3}, None)


def test_a_missing_manifest_is_damage(tmp_path):
    with pytest.raises(Damaged, match=r"manifest\.json is missing"):
        read_manifest(tmp_path / "nowhere")


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_garbage_is_never_a_manifest_with_files(tmp_path_factory, garbage):
    folder = tmp_path_factory.mktemp("garbage")
    (folder / MANIFEST).write_bytes(garbage)
    with suppress(Damaged):
        assert read_manifest(folder)[1] is None


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_manifest_with_one_changed_byte_says_the_same_or_is_damage(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    (folder / "f").touch()
    written = ({"step": 3, "pending": [1, 2]}, take(folder))
    write_manifest(folder, *written)
    content = bytearray((folder / MANIFEST).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / MANIFEST).write_bytes(content)
    with suppress(Damaged):
        assert read_manifest(folder) == written


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_manifest_that_was_cut_is_damage(folder, length):
    write_manifest(folder, {"step": 3}, take(folder))
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:length])
    with pytest.raises(Damaged, match=r"manifest\.json is not what was written"):
        read_manifest(folder)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
