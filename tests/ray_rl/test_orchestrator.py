import asyncio
from pathlib import Path

import pytest

from ray_rl.collector import RunStopped
from ray_rl.config import resolve_config
from ray_rl.ledger import read_ledger
from ray_rl.run_state import RunFolder
from tests.fakes import FakePool, collected
from tests.orchestrated_run import Run, config_of


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_of())


def test_strictly_on_policy_samples_every_batch_with_the_version_before_its_step(folder):
    run = Run(folder, config_of()).go()
    assert run.pool.published == [0, 1, 2, 3]
    assert [version for _, version in run.pool.sampled[:12]] == [0] * 4 + [1] * 4 + [2] * 4
    assert run.learner.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [metrics["staleness/mean"] for _, metrics in run.sink.logged if "staleness/mean" in metrics] == [0.0] * 3


def test_with_staleness_one_groups_are_at_most_one_version_old(folder):
    run = Run(folder, config_of(steps=6, max_staleness=1)).go()
    staleness = [metrics["staleness/mean"] for _, metrics in run.sink.logged if "staleness/mean" in metrics]
    assert len(staleness) == 6
    assert all(0 <= value <= 1 for value in staleness)
    assert max(staleness) == 1


def test_evaluates_before_and_after_on_held_out_problems(folder):
    run = Run(folder, config_of()).go()
    assert run.report.evaluation_before["eval/pass@1"] == 0.0
    assert run.report.evaluation_after["eval/pass@1"] == 1.0


def test_the_last_step_is_saved_and_exported(folder):
    Run(folder, config_of()).go()
    saved = folder.latest_state()
    assert (saved.step, saved.policy_version, saved.trained, saved.dropped) == (3, 3, 12, {})
    assert (folder.checkpoint(3) / "learner").is_dir()
    assert folder.final.is_dir()


def test_a_resumed_run_trains_every_prompt_of_the_stream_exactly_once(folder):
    first = Run(folder, config_of(steps=2)).go()
    second = Run(folder, config_of(steps=4)).go(folder.latest_state())
    trained = [position for batch in (*first.learner.trained, *second.learner.trained) for position in batch]
    assert sorted(trained) == list(range(16))
    assert second.pool.published == [2, 3, 4]
    assert [step for step, _ in second.sink.logged if _.get("timing/step")] == [3, 4]


def test_a_requested_stop_saves_what_is_trained_and_does_not_export(folder):
    run = Run(folder, config_of(steps=1000))
    run.stop_at = 2
    run.go()
    assert run.report.interrupted
    assert folder.latest_state().step == 2
    assert not folder.final.exists()


def test_too_many_failed_gradings_stop_the_run_with_the_mend(folder):
    pool = FakePool(make=lambda position, version: collected(position, version=version, failures=7, graded=14))
    with pytest.raises(RunStopped, match=r"reward.max_failure_share: 50% of this step's gradings failed"):
        Run(folder, config_of(), pool).go()


def test_the_first_failure_of_a_rollout_ends_the_run_as_itself(folder):
    class Broken(FakePool):
        async def collect(self, prompt):
            raise ConnectionError("no actor answers")

    with pytest.raises(ConnectionError, match="no actor answers"):
        Run(folder, config_of(), Broken()).go()


def test_a_step_that_learns_nothing_is_said(folder):
    pool = FakePool(make=lambda position, version: collected(position, version=version, rewards=(0.0, 0.0)))
    run = Run(folder, config_of(), pool).go()
    assert any("too hard" in warning for warning in run.screen.warnings)


def test_what_is_trained_is_saved_when_the_gradings_of_a_later_step_fail(folder):
    def make(position, version):
        return collected(position, version=version, failures=14 if version == 2 else 0, graded=14)

    with pytest.raises(RunStopped):
        Run(folder, config_of(), FakePool(make=make)).go()
    assert folder.latest_state().step == 2
    assert folder.latest_state().pending_positions == (8, 9, 10, 11)


def test_what_is_trained_is_saved_when_a_later_rollout_fails(folder):
    class Broken(FakePool):
        async def collect(self, prompt):
            if self.version == 1:
                raise RunStopped("broken")
            return await super().collect(prompt)

    with pytest.raises(RunStopped, match="broken"):
        Run(folder, config_of(), Broken()).go()
    assert folder.latest_state().step == 1


def test_a_prompt_whose_group_was_dropped_is_not_pending(folder):
    def make(position, version):
        return collected(position, version=0 if position == 5 else version)

    run = Run(folder, config_of(steps=6, max_staleness=1), FakePool(make=make)).go()
    dropped = [
        position for line in read_ledger(folder.path / "ledger.jsonl") for position in line.dropped.get("stale", ())
    ]
    assert 5 not in folder.latest_state().pending_positions
    assert 5 in dropped or any(5 in batch for batch in run.learner.trained)


def test_an_evaluation_before_is_not_reported_as_one_after(folder):
    config = resolve_config(
        {"training": {"steps": 1, "prompts_per_step": 4}, "evaluation": {"problems": 1, "at_end": False}}
    )
    report = Run(folder, config).go().report
    assert report.evaluation_before["eval/pass@1"] == 0.0
    assert report.evaluation_after == {}


@pytest.mark.parametrize(("room", "said"), [(2, ""), (1, "; the cluster has no place for 1 of the 2 at present")])
def test_a_run_that_grows_by_itself_says_when_the_cluster_has_no_place_for_that(folder, room, said):
    class SlowPool(FakePool):
        async def collect(self, prompt):
            await asyncio.sleep(0.01)
            return await super().collect(prompt)

    config = resolve_config(
        {
            "training": {"steps": 3, "prompts_per_step": 4, "max_staleness": 0},
            "evaluation": {"problems": 1},
            "rollout": {"num_actors": {"min": 1, "max": 2}},
        }
    )
    run = Run(folder, config, pool=SlowPool())
    run.room = room
    run.go()
    assert run.screen.notes == [f"rollout.num_actors: from 1 to 2 actors{said}"]
