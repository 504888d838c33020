"""One user at a time of a run in a store, told from what the store holds, without comparing clocks."""

import threading
from pathlib import Path

import pytest

from ray_rl.errors import ConfigError
from ray_rl.lease import LEASE, Lease, LeaseLost, Rhythm, holder
from ray_rl.object_store import ObjectStore
from tests.faulty_store import TWICE, empty_store, failing

QUICK = Rhythm(beat=0.05, silence=0.5, settle=0.05)
HERE = Path("here")


def lease(store, rhythm: Rhythm = QUICK) -> Lease:
    return Lease(store, HERE, rhythm)


def test_it_is_there_while_it_is_held():
    store = empty_store()
    with lease(store).held():
        assert holder(store).folder == "here"
        assert str(holder(store)).startswith("process ")
    assert holder(store) is None
    with lease(store).held():
        pass


def test_a_holder_that_lives_is_left_alone():
    store = empty_store()
    with lease(store).held():
        with (
            pytest.raises(
                ConfigError, match=r"run: process \d+ on .*, since .* is using this run; wait for it or end it"
            ),
            lease(store).held(),
        ):
            pass
        assert holder(store) is not None


def test_a_holder_that_died_is_outwaited():
    store = empty_store()
    with lease(store).held():
        left = store.read(LEASE)
    store.write(LEASE, left)
    with lease(store).held():
        assert store.read(LEASE) != left


def test_one_that_lets_go_meanwhile_is_not_waited_for():
    store = empty_store()
    with lease(store).held():
        left = store.read(LEASE)
    store.write(LEASE, left)
    threading.Timer(0.2, store.delete, [LEASE]).start()
    with lease(store, Rhythm(beat=0.05, silence=60, settle=0.05)).held():
        pass


def test_who_was_taken_over_notices_and_leaves_the_other_s_lease():
    store = empty_store()
    with lease(store).held():
        another = store.read(LEASE)
    first = lease(store, Rhythm(beat=60, settle=0))
    with first.held():
        first.check()
        store.write(LEASE, another)
        with pytest.raises(LeaseLost, match=r"has taken this run over"):
            first.check()
    assert store.read(LEASE) == another


def test_of_two_that_begin_at_the_same_moment_at_most_one_goes_on(tmp_path):
    store = ObjectStore.of(f"file://{tmp_path}/run")
    both, going_on, refused = threading.Barrier(2), [], []

    def begin():
        both.wait(10)
        try:
            with lease(store, Rhythm(beat=0.05, silence=2, settle=0.3)).held():
                going_on.append(1)
                both.wait(10)
        except ConfigError as error:
            refused.append(error)
            both.wait(10)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(going_on) <= 1
    assert len(going_on) + len(refused) == 2


def test_a_store_that_fails_for_some_beats_costs_nothing():
    store = empty_store(TWICE)
    with lease(store).held():
        before = holder(store).beats
        with failing(0, 5):
            threading.Event().wait(0.5)
        assert holder(store).beats > before


def test_a_lease_of_another_version_is_said():
    store = empty_store()
    store.write(LEASE, b"{}")
    with pytest.raises(ConfigError, match=r"lease\.json: another version wrote it; delete it"):
        holder(store)
