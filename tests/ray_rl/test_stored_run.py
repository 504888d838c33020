"""A run in a store: the same as in a folder, whole checkpoints or none whatever operation fails, one user at a time."""

import gc
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from ray_rl.config import ConfigError
from ray_rl.errors import NotWritten, RunError
from ray_rl.inventory import MANIFEST, FileEntry
from ray_rl.lease import LEASE, LeaseLost, Rhythm, holder
from ray_rl.ledger import audit
from ray_rl.object_store import ObjectStore, StoreUnreadable
from ray_rl.run_places import contact_folder, create_run, is_run, open_run, place_of
from ray_rl.run_state import RunFolder, RunState
from ray_rl.stored_run import StoredRun, working_copy
from tests.fakes import FakeLearner
from tests.faulty_store import TWICE, Killed, empty_store, failing
from tests.orchestrated_run import Run, config_of

QUICK = Rhythm(beat=5, silence=0.3, settle=0)


def every_second_step(steps: int):
    return config_of(steps=steps).model_copy(
        update={"checkpoint": config_of().checkpoint.model_copy(update={"every": 2, "keep": 2})}
    )


def sit(store: ObjectStore, steps: int) -> Run:
    """One sitting on a machine that knows nothing of earlier ones."""
    new = not store.sizes()
    config = every_second_step(steps)
    folder = StoredRun.make(store, config, QUICK) if new else StoredRun.found(store, QUICK)
    with folder.locked():
        run = Run(folder, config)
        folder.write_config(config)
        (folder.path / "metrics.jsonl").touch()
        return run.go(folder.find_start().state)


def steps_of(store: ObjectStore) -> list[int]:
    return StoredRun.found(store, QUICK).steps()


def learned(store: ObjectStore, name: str) -> list[list[int]]:
    return json.loads(store.read(name))


def test_a_run_leaves_in_the_store_what_it_would_leave_in_a_folder(tmp_path):
    store = empty_store()
    sit(store, 6)
    local = RunFolder.create(tmp_path / "run", every_second_step(6))
    Run(local, every_second_step(6)).go()
    there = {name for name in store.sizes() if name != "metrics.jsonl"}
    assert there == {path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()}
    assert store.read("ledger.jsonl") == (local.path / "ledger.jsonl").read_bytes()
    assert learned(store, "final/policy.json") == json.loads((local.final / "policy.json").read_text())
    assert steps_of(store) == local.steps() == [4, 6]


def test_it_is_resumed_on_another_machine_in_the_same_state(tmp_path):
    store, whole = empty_store(), ObjectStore.of(f"file://{tmp_path}/whole")
    sit(whole, 7)
    for steps in (3, 5, 7):
        sit(store, steps)
    assert store.read("ledger.jsonl") == whole.read("ledger.jsonl")
    assert learned(store, "final/policy.json") == learned(whole, "final/policy.json")
    assert StoredRun.found(store).find_start().state == StoredRun.found(whole).find_start().state


def changes_of(store: ObjectStore) -> int:
    """Operations that a whole run takes."""
    with failing() as plan:
        sit(store, 5)
    return plan.begun


CHANGES = changes_of(empty_store())


@pytest.mark.parametrize("number", range(CHANGES))
def test_a_run_that_is_killed_at_any_operation_goes_on_at_a_whole_checkpoint(number):
    store = empty_store()
    with failing(number, error=Killed), suppress(Killed, RunError):  # the last operations only clear up
        sit(store, 5)
    if "config.yaml" not in store.sizes():
        sit(store, 5)
    else:
        found = StoredRun.found(store, QUICK)
        start = found.find_start()
        assert start.notes == ()
        assert start.state.step == max(found.steps(), default=0)
        if start.state.step:
            folder = store / f"checkpoints/step_{start.state.step}"
            assert len(learned(folder, "learner/weights.json")) == start.state.step
        sit(store, 5)
    assert learned(store, "final/policy.json") == learned(store, "checkpoints/step_5/learner/weights.json")
    assert len(learned(store, "final/policy.json")) == 5
    run = StoredRun.found(store, QUICK)
    with run.locked():
        found = audit(run.ledger, run.find_start().state)
    assert (found.trained, found.lost, found.duplicated) == (20, (), ())
    leftovers = {name.split("/")[1] for name in store.sizes() if name.startswith("checkpoints/")}
    assert leftovers == {f"step_{step}" for step in run.steps()}


@pytest.fixture
def saved() -> ObjectStore:
    store = empty_store()
    sit(store, 4)
    return store


def save(folder: StoredRun, step: int, lost: Mapping[str, FileEntry] = {}) -> None:
    state = RunState(step=step, policy_version=step, position=0, pending_positions=(), seed=0)
    with folder.new_checkpoint(state) as new:
        for name in ("learner", "policy"):
            (new.place / name).write("weights.json", b"[]" * step)
            new.add(name, {"weights.json": (new.place / name).entry("weights.json"), **lost})


def test_a_checkpoint_is_not_there_before_its_manifest(saved):
    folder = StoredRun.found(saved, QUICK)
    with failing() as plan:
        save(folder, 9)
    assert plan.done[-1].endswith("checkpoints/step_9/manifest.json")
    saved.delete(f"checkpoints/step_9/{MANIFEST}")
    assert folder.steps() == [2, 4]
    assert folder.find_start().notes == ()
    assert folder.prune(2, 9) == []
    assert not any("step_9" in name for name in saved.sizes())


def test_a_checkpoint_loses_its_manifest_first(saved):
    with failing() as plan:
        StoredRun.found(saved, QUICK).prune(1, 4)
    assert [name.rpartition("step_2/")[2] for name in plan.done] == [
        MANIFEST,
        "learner/weights.json",
        "policy/policy.json",
    ]
    assert steps_of(saved) == [4]


def test_what_did_not_arrive_is_no_checkpoint(saved):
    folder = StoredRun.found(saved, QUICK)
    lost = {"lost": saved.entry("config.yaml")}
    with pytest.raises(NotWritten, match=r"step_9: not all of it arrived: learner/lost is missing"):
        save(folder, 9, lost)
    assert folder.steps() == [2, 4]


@pytest.mark.parametrize("accident", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(saved, accident):
    name = "checkpoints/step_4/learner/weights.json"
    content = saved.read(name)
    if accident == "gone":
        saved.delete(name)
    else:
        saved.write(name, content[:-2] if accident == "cut" else content.replace(b"1", b"7"))
    start = StoredRun.found(saved, QUICK).find_start()
    assert start.state.step == 2
    assert [note.partition(" ")[0] for note in start.notes] == ["step"]
    assert start.notes[0].endswith("; going on from step 2")
    sit(saved, 6)
    assert steps_of(saved) == [4, 6]


def test_the_policy_comes_here_by_the_digests_it_was_written_with(saved, tmp_path):
    folder = open_run(saved)
    assert json.loads((folder.policy() / "policy.json").read_text()) == learned(saved, "final/policy.json")
    assert len(json.loads((folder.policy(2) / "policy.json").read_text())) == 2
    with pytest.raises(ConfigError, match=r"faulty://bucket/run: no complete checkpoint of step 3; there are: 2, 4"):
        folder.policy(3)


def test_a_store_that_refuses_costs_a_checkpoint_and_not_the_run():
    store = empty_store()
    folder = StoredRun.make(store, every_second_step(5), QUICK)
    with folder.locked():
        run = Run(folder, every_second_step(5), learner=Refused())
        run.go()
    assert [warning.partition(",")[0] for warning in run.screen.warnings] == ["no checkpoint after step 2"]
    assert steps_of(store) == [4, 5]


class Refused(FakeLearner):
    """While its first checkpoint is made, the store takes nothing."""

    refused = False

    async def save(self, folder):
        if self.refused:
            return await super().save(folder)
        self.refused = True
        with failing(0):
            return await super().save(folder)


def test_a_store_that_does_not_answer_when_a_checkpoint_is_begun_costs_a_checkpoint_too(saved, monkeypatch):
    def silent(self):
        raise StoreUnreadable(f"{self}: cannot be read")

    folder = StoredRun.found(saved, QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "sizes", silent)
        with pytest.raises(NotWritten, match="cannot be read"):
            save(folder, 9)
    assert folder.prune(2, 4) == []


def report_in_vain(folder: StoredRun) -> None:
    with failing() as plan, folder.locked():
        (folder.path / "report.json").write_text("{}")
        plan.first = 0


def test_what_could_not_be_brought_there_stays_here_and_is_named():
    store = empty_store(TWICE)
    folder = StoredRun.make(store, config_of(), QUICK)
    with pytest.raises(NotWritten, match=r"what is not there lies in /") as caught:
        report_in_vain(folder)
    kept = str(caught.value).rpartition(" ")[2]
    assert kept == str(folder.path)
    del folder
    gc.collect()
    assert (Path(kept) / "report.json").read_text() == "{}"
    shutil.rmtree(kept)


def test_the_working_copy_goes_with_the_run(saved):
    folder = StoredRun.found(saved, QUICK)
    path = folder.path
    assert path.is_dir()
    del folder
    gc.collect()
    assert not path.exists()


def be_taken_over(folder: StoredRun) -> None:
    with folder.locked():
        other = json.loads(folder.store.read(LEASE)) | {"token": "another"}
        folder.store.write(LEASE, json.dumps(other).encode())
        (folder.path / "metrics.jsonl").write_text("of a run that nobody wants any more")
        with pytest.raises(LeaseLost, match=r"has taken this run over; end one of the two"):
            save(folder, 9)


def test_nothing_is_written_into_a_run_that_another_took_over(saved):
    folder = StoredRun.found(saved, QUICK)
    with pytest.raises(LeaseLost, match=r"has taken this run over; .* what is not there lies in") as caught:
        be_taken_over(folder)
    shutil.rmtree(str(caught.value).rpartition(" ")[2])
    assert saved.read("metrics.jsonl") == b""
    assert steps_of(saved) == [2, 4]
    assert holder(saved).token == "another"


def test_who_lost_the_run_deletes_no_checkpoint_of_it(saved):
    folder = StoredRun.found(saved, QUICK)
    other = holder_of_another()
    saved.write(LEASE, other)
    state = RunState(step=4, policy_version=4, position=0, pending_positions=(), seed=0)
    with pytest.raises(LeaseLost), folder.new_checkpoint(state):
        pytest.fail("it has begun")
    with pytest.raises(LeaseLost):
        folder.prune(1, 2)
    assert steps_of(saved) == [2, 4]


def holder_of_another() -> bytes:
    lease = {"token": "another", "host": "elsewhere", "pid": 1, "since": "now", "folder": "/tmp/x"}
    return json.dumps(lease).encode()


def test_a_run_may_begin_where_somebody_died_while_trying_the_store():
    store = empty_store()
    with failing(1, error=Killed), suppress(Killed):
        store.prove()
    assert len(store.sizes()) == 1
    StoredRun.make(store, config_of(), QUICK)


def test_a_run_that_is_in_use_is_named_by_its_driver_s_copy(saved):
    with pytest.raises(
        ConfigError, match=r"no run is going on here; go on with this one: ray-rl train --resume faulty://"
    ):
        working_copy(saved)
    folder = StoredRun.found(saved, QUICK)
    with folder.locked():
        assert contact_folder(saved.url) == folder.path
        away = json.loads(saved.read(LEASE)) | {"host": "elsewhere"}
        saved.write(LEASE, json.dumps(away).encode())
        with pytest.raises(ConfigError, match=r"process \d+ on elsewhere, since .* drives this run; ask there"):
            working_copy(saved)
        saved.delete(LEASE)


def test_the_logs_of_a_run_that_never_got_as_far_as_a_metric_are_kept():
    store = empty_store()
    folder = StoredRun.make(store, config_of(), QUICK)
    with folder.locked():
        folder.logs.mkdir()
        (folder.logs / "rollout-0.log").write_text("why")
        folder.remove_unused()
    assert list(store.sizes()) == ["logs/rollout-0.log"]
    StoredRun.make(store, config_of(), QUICK)


def test_what_only_means_something_here_is_not_sent(saved):
    folder = StoredRun.found(saved, QUICK)
    assert folder.path.name == "run"
    with folder.locked():
        for name in ("control.json", "prometheus.json", ".lock"):
            (folder.path / name).write_text("{}")
        (folder.path / "report.json").write_text("{}")
    assert not {"control.json", "prometheus.json", ".lock"} & saved.sizes().keys()
    assert "report.json" in saved.sizes()


def test_a_file_that_a_tracker_takes_away_meanwhile_costs_no_checkpoint(saved, monkeypatch):
    send = ObjectStore.send

    def send_late(self, file, name):
        if name == "wandb/passing":
            file.unlink()
        send(self, file, name)

    folder = StoredRun.found(saved, QUICK)
    monkeypatch.setattr(ObjectStore, "send", send_late)
    with folder.locked():
        (folder.path / "wandb").mkdir()
        (folder.path / "wandb" / "passing").touch()
        save(folder, 9)
    assert folder.steps() == [2, 4, 9]


def test_a_run_that_never_got_as_far_as_a_metric_leaves_nothing():
    store = empty_store()
    folder = StoredRun.make(store, config_of(), QUICK)
    with folder.locked():
        folder.remove_unused()
    assert store.sizes() == {}
    StoredRun.make(store, config_of(), QUICK)


def test_a_folder_with_something_in_it_is_refused_with_the_way_to_go_on(saved):
    with pytest.raises(
        ConfigError, match=r"bucket/run is not empty; go on with it: train --resume faulty://bucket/run; or"
    ):
        StoredRun.make(saved, config_of())
    with pytest.raises(ConfigError, match=r"not a run folder"):
        StoredRun.found(saved / "final")


def test_places_are_paths_or_urls(tmp_path):
    empty_store()
    for text in (str(tmp_path / "run"), "faulty://bucket/run"):
        place = place_of(text)
        assert not is_run(place)
        create_run(place, config_of())
        assert is_run(place)
        assert open_run(place).where == text
        assert open_run(place).find_start().state.step == 0
