from contextlib import ExitStack

import pytest

from actors.occupancy import Occupancy
from ray_rl.config import resolve_config


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    return Clock()


def test_only_a_batch_less_than_half_full_with_every_place_taken_counts(clock):
    occupancy = Occupancy(2, 4, clock)
    with ExitStack() as work:
        work.enter_context(occupancy.group())
        clock.now += 1  # a place is free: nothing waits
        with occupancy.group():
            clock.now += 2  # counts: no request at all
            with occupancy.request():
                clock.now += 4  # counts: one of four
                with occupancy.request():
                    clock.now += 8  # half full
                clock.now += 16  # counts
            assert occupancy.take_underfull() == 2 + 4 + 16
            assert occupancy.take_underfull() == 0
            clock.now += 32  # counts
        clock.now += 64  # a place is free
        assert occupancy.take_underfull() == 32


@pytest.mark.parametrize(("given", "expected"), [({}, 64), ({"group_size": 100}, 6), ({"groups_in_flight": 3}, 3)])
def test_an_actor_is_given_twice_the_groups_that_fill_its_engine(given, expected):
    assert resolve_config({"rollout": {"max_sequences": 256} | given}).rollout.most_groups == expected
