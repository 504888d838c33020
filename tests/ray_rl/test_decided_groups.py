"""`training.decided_groups` over whole runs: what is trained on, what is dropped, and that nothing is lost or uncounted."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_rl.collector import RunStopped
from ray_rl.ledger import read_ledger
from ray_rl.protocols import CollectedGroup
from ray_rl.run_state import RunFolder
from tests.fakes import FakePool, collected
from tests.orchestrated_run import Run, config_of


class ShufflingPool(FakePool):
    """Groups end in another order than they began in."""

    async def collect(self, prompt):
        group = await super().collect(prompt)
        for _ in range(prompt.position * 7 % 5):
            await asyncio.sleep(0)
        return group


def deciding(is_decided: Callable[[int], bool]) -> Callable[[int, int], CollectedGroup]:
    """Groups of 20 + 60 tokens, of which those at some positions are decided."""

    def make(position: int, version: int) -> CollectedGroup:
        return collected(position, version=version, rewards=(1.0, 1.0) if is_decided(position) else (0.0, 1.0))

    return make


def half(position: int) -> bool:
    return position % 2 == 0


def every(position: int) -> bool:
    return True


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_of())


def test_refill_trains_full_batches_of_undecided_groups_only(folder):
    run = Run(folder, config_of(decided_groups="refill"), FakePool(make=deciding(half))).go()
    assert run.learner.trained == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]]
    assert run.recorded_groups == run.learner.trained


def test_refill_on_policy_samples_the_replacements_with_the_version_of_their_step(folder):
    run = Run(folder, config_of(decided_groups="refill"), FakePool(make=deciding(half))).go()
    assert [metrics["staleness/max"] for metrics in run.steps] == [0.0] * 3


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("is_decided", [half, every])
@pytest.mark.parametrize("policy", ["drop", "refill"])
def test_every_sampled_prompt_is_trained_on_once_or_dropped_also_over_a_resumption(
    folder, policy, is_decided, max_staleness
):
    config = config_of(steps=8, decided_groups=policy, max_staleness=max_staleness, refill_limit=3)
    first, second = (Run(folder, config, ShufflingPool(make=deciding(is_decided))) for _ in range(2))
    first.stop_at = 3
    first.go()
    second.go(folder.latest_state())
    trained = [position for run in (first, second) for batch in run.learner.trained for position in batch]
    dropped = [position for line in read_ledger(folder.ledger) for of in line.dropped.values() for position in of]
    assert (first.report.steps, second.report.steps) == (3, 8)
    assert folder.latest_state().pending_positions == ()
    assert sorted([*trained, *dropped]) == list(range(second.stream.position))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_refill_of_a_policy_that_decides_everything_samples_up_to_the_limit_and_trains_on_decided_groups(
    folder, max_staleness
):
    config = config_of(decided_groups="refill", max_staleness=max_staleness, refill_limit=2)
    run = Run(folder, config, FakePool(make=deciding(every))).go()
    assert [len(batch) for batch in run.learner.trained] == [4, 4, 4]
    assert len([position for position, _ in run.pool.sampled]) == 3 * 2 * 4
    assert [metrics["groups/decided_trained"] for metrics in run.steps] == [4.0] * 3


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("policy", ["keep", "drop", "refill"])
def test_tokens_of_dropped_groups_are_counted(folder, policy, max_staleness):
    config = config_of(decided_groups=policy, max_staleness=max_staleness)
    run = Run(folder, config, ShufflingPool(make=deciding(half))).go()
    sampled = len(run.pool.sampled)
    assert sum(metrics["tokens/primary"] for metrics in run.steps) == 20 * sampled == run.report.primary_tokens
    assert sum(metrics["tokens/continuations"] for metrics in run.steps) == 60 * sampled
    trained = sum(len(batch) for batch in run.learner.trained)
    assert sum(metrics["groups/filtered"] for metrics in run.steps) == sampled - trained
    assert sum(run.report.dropped_groups.values()) == sampled - trained


def test_drop_trains_on_what_is_left_of_each_batch(folder):
    run = Run(folder, config_of(decided_groups="drop"), FakePool(make=deciding(half))).go()
    assert run.learner.trained == [[1, 3], [5, 7], [9, 11]]
    assert [metrics["groups/decided_fraction"] for metrics in run.steps] == [0.5] * 3
    assert run.steps[-1]["groups/dropped"] == run.steps[-1]["groups/dropped_decided"] == 6


def test_a_step_whose_groups_were_all_dropped_trains_nothing_but_is_published_logged_and_told(folder):
    run = Run(folder, config_of(decided_groups="drop"), FakePool(make=deciding(lambda position: position < 4))).go()
    assert run.learner.trained == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert run.pool.published == [0, 1, 2, 3]
    assert run.recorded == [1, 2, 3]
    assert len(run.steps) == 3
    assert any("every group of step 1 was decided" in warning for warning in run.screen.warnings)


def test_failed_gradings_of_dropped_groups_stop_the_run_too(folder):
    def make(position, version):
        failures = 14 if half(position) else 0
        rewards = (0.0, 0.0) if half(position) else (0.0, 1.0)
        return collected(position, version=version, rewards=rewards, failures=failures, graded=14)

    with pytest.raises(RunStopped, match="max_failure_share"):
        Run(folder, config_of(decided_groups="refill"), FakePool(make=make)).go()
