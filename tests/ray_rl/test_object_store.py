"""A folder of a store: whole objects, errors in one line after few attempts, and no secrets in URLs."""

import pickle
import threading

import pytest

from ray_rl.errors import ConfigError, NotWritten
from ray_rl.inventory import take
from ray_rl.object_store import ObjectStore, Patience, StoreUnreadable, is_url
from tests.faulty_store import TWICE, FaultyFileSystem, empty_store, failing


@pytest.fixture(params=["file", "faulty"])
def store(request, tmp_path) -> ObjectStore:
    return ObjectStore.of(f"file://{tmp_path}/store") if request.param == "file" else empty_store()


def test_a_folder_that_is_not_there_is_empty(store):
    assert store.sizes() == {}
    store.delete_all()
    store.delete("nothing")


def test_what_is_written_reads_back_and_is_replaced_as_a_whole(store):
    store.write("a/b", b"first, and longer")
    store.write("a/b", b"second")
    assert (store / "a").read("b") == store.read("a/b") == b"second"
    assert store.sizes() == {"a/b": 6}


def test_files_travel_with_their_digests(store, tmp_path):
    file = tmp_path / "here" / "weights"
    file.parent.mkdir()
    file.write_bytes(bytes(range(256)) * 70_000)
    store.send(file, "learner/weights")
    entry = take(file.parent)["weights"]
    assert store.entry("learner/weights") == store.fetch("learner/weights", tmp_path / "new" / "copy") == entry
    assert (tmp_path / "new" / "copy").read_bytes() == file.read_bytes()


def test_objects_are_copied_and_deleted(store):
    store.write("policy/a", b"1")
    store.write("policy/sub/b", b"2")
    (store / "policy").copy("sub/b", store / "final")
    assert store.sizes() == {"policy/a": 1, "policy/sub/b": 1, "final/sub/b": 1}
    store.delete("policy/a")
    assert store.sizes() == {"policy/sub/b": 1, "final/sub/b": 1}
    (store / "policy").delete_all()
    assert store.sizes() == {"final/sub/b": 1}


@pytest.mark.parametrize("ask", [ObjectStore.read, ObjectStore.entry])
def test_what_is_not_there_is_told_from_what_cannot_be_read(store, ask):
    with pytest.raises(FileNotFoundError):
        ask(store, "nothing")


def test_it_travels_between_processes_and_knows_its_neighbours():
    store = pickle.loads(pickle.dumps(empty_store()))
    assert (str(store / "a/b"), (store / "a").parent, (store / "a").name) == (f"{store.url}/a/b", store, "a")


def test_a_store_that_fails_once_is_asked_again():
    store = empty_store(TWICE)
    with failing(0, 0):
        store.write("a", b"whole")
    assert store.read("a") == b"whole"


def test_a_store_that_goes_on_failing_is_one_line():
    store = empty_store(TWICE)
    with failing(0) as plan, pytest.raises(NotWritten) as caught:
        store.write("a", b"whole")
    assert plan.begun == 2
    assert str(caught.value).startswith("faulty://bucket/run/a: could not be written: no write /bucket/run/a today")
    assert "(attempt 2 of 2); check the network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_forgets_is_found_out(monkeypatch):
    store = empty_store()
    store.prove()
    assert store.sizes() == {}
    monkeypatch.setattr(ObjectStore, "read", lambda self, name: b"else")
    with pytest.raises(NotWritten, match="does not give back what was written"):
        store.prove()


def test_trying_a_store_that_cannot_be_read_leaves_nothing(monkeypatch):
    def refuse(self, name):
        raise StoreUnreadable(f"{self}/{name}: cannot be read")

    store = empty_store()
    monkeypatch.setattr(ObjectStore, "read", refuse)
    with pytest.raises(StoreUnreadable):
        store.prove()
    assert store.sizes() == {}


def test_a_bug_is_no_fault_of_the_store():
    with failing(0, error=TypeError), pytest.raises(TypeError):
        empty_store(TWICE).write("a", b"whole")


def test_a_store_that_hangs_is_given_up(monkeypatch):
    store = empty_store(Patience(seconds=0.5, attempts=1))
    store.write("a", b"whole")
    hangs = threading.Event()
    monkeypatch.setattr(FaultyFileSystem, "find", lambda *args, **kwargs: hangs.wait(20))
    with pytest.raises(StoreUnreadable, match=r"bucket/run: cannot be read: waited 0\.5 s for .* to be listed"):
        store.sizes()
    hangs.set()


def test_a_place_that_takes_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    store = ObjectStore.of(f"file://{tmp_path}/file/run", TWICE)
    with pytest.raises(NotWritten, match=r"file/run/a: could not be written: .*check the network"):
        store.write("a", b"whole")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("s3://key:secret@bucket/run", r"^s3://bucket/run: a URL is no place for a password"),
        ("s3://key:sec/ret@bucket/secret@home", r"^s3://home: a URL is no place for a password"),
        ("s3://bucket/run?region=x", r"neither \? nor #"),
        ("s3://bucket/run?secret_key=secret", r"^s3://bucket/run: neither"),
        ("s3://", "names no place"),
        ("s3:///", "names no place"),
        ("nonsense://bucket/run", "Protocol not known: nonsense; use s3://"),
        ("dropbox://bucket/run", "dropbox:// needs a package that is not installed"),
    ],
)
def test_a_url_that_cannot_work_is_one_line(url, fault):
    with pytest.raises(ConfigError, match=fault) as caught:
        ObjectStore.of(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_urls_and_paths_are_told_apart():
    assert all(map(is_url, ["s3://a/b", "file:///a", "gs://a"]))
    assert not any(map(is_url, ["runs/a", "/a/b", "a:b", "C:/x", "s3:/a"]))
