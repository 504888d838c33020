import asyncio
import time

import pytest

from benchmarks.plan.engine import SimulatedEngine
from benchmarks.plan.virtual_time import run_in_virtual_time

SLOWER = {1: 1.0, 2: 1.0}
"""Two sequences together get a token a second, each half of it."""
SAME = {1: 1.0, 2: 2.0}
"""Each gets a token a second."""


def ends_of(engine, *samples, pause=None):
    """When each is done that begins at `at`."""

    async def one(at, lengths, **more):
        await asyncio.sleep(at)
        await engine.sample(lengths, **{"age": 0} | more)
        return time.monotonic()

    async def stop(at, seconds, drain):
        await asyncio.sleep(at)
        await engine.pause(seconds, drain=drain)

    async def all_of_them():
        pausing = [stop(*pause)] if pause else []
        return (await asyncio.gather(*(one(*args, **more) for args, more in samples), *pausing))[: len(samples)]

    return run_in_virtual_time(all_of_them(), most_seconds=1e6)


def begin(at, *lengths, **more):
    return (at, lengths), more


def test_running_sequences_share_the_engine_and_the_last_one_has_it_alone():
    engine = SimulatedEngine(SLOWER, 2)
    assert ends_of(engine, begin(0, 10), begin(0, 20)) == pytest.approx([20, 30])
    assert engine.busy_seconds == pytest.approx(30)


def test_a_group_is_done_with_its_longest_sequence():
    assert ends_of(SimulatedEngine(SAME, 2), begin(0, 10, 25)) == pytest.approx([25])


def test_a_sequence_that_comes_later_slows_the_others_from_then_on():
    assert ends_of(SimulatedEngine(SLOWER, 2), begin(0, 10), begin(4, 3)) == pytest.approx([13, 10])


def test_who_finds_no_place_waits_and_older_groups_go_first():
    samples = begin(0, 10, 10), begin(1, 5, age=7), begin(2, 5, 5, age=3)
    assert ends_of(SimulatedEngine(SAME, 2), *samples) == pytest.approx([10, 20, 15])


def test_a_prompt_holds_up_all_that_runs():
    engine = SimulatedEngine(SAME, 2)
    assert ends_of(engine, begin(0, 10), begin(5, 10, prefill_seconds=3)) == pytest.approx([13, 18])


def test_new_weights_stop_what_runs_or_let_it_end_first():
    assert ends_of(SimulatedEngine(SAME, 2), begin(0, 10), begin(5, 10), pause=(4, 3, False)) == pytest.approx([13, 17])
    engine = SimulatedEngine(SAME, 2)
    assert ends_of(engine, begin(0, 10), begin(5, 10), pause=(4, 3, True)) == pytest.approx([10, 23])
    assert engine.busy_seconds == pytest.approx(20)
