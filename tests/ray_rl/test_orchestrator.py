import asyncio
from pathlib import Path

import pytest

from ray_rl.config import RunConfig, resolve_config
from ray_rl.orchestrator import Orchestrator, RunStopped
from ray_rl.prompt_stream import PromptStream
from ray_rl.run_report import RunReport
from ray_rl.run_state import RunFolder, RunState
from tests.fakes import FakeLearner, FakePool, collected, problem, prompt


class Sink:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step, metrics) -> None:
        self.logged.append((step, dict(metrics)))

    def close(self) -> None: ...


class Screen:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def phase(self, text) -> None: ...

    def step(self, step, metrics) -> None: ...

    def evaluation(self, step, metrics) -> None: ...

    def warn(self, text) -> None:
        self.warnings.append(text)


class Run:
    """An orchestrator on fakes, with everything it touches in reach."""

    def __init__(self, folder: RunFolder, config: RunConfig, pool: FakePool | None = None) -> None:
        self.pool = pool or FakePool()
        self.learner = FakeLearner()
        self.sink = Sink()
        self.screen = Screen()
        self.folder = folder
        self.recorded: list[int] = []
        problems = [problem(f"p{index}") for index in range(10)]
        self.stream = PromptStream(problems, lambda row, *, position: prompt(position), seed=config.seed, shuffle=True)
        self.report = RunReport(name="test", folder=str(folder.path))
        self.orchestrator = Orchestrator(
            config,
            pool=self.pool,
            learner=self.learner,
            stream=self.stream,
            evaluation_prompts=[prompt(-1)],
            folder=folder,
            sink=self.sink,
            record=self._record,
            progress=self.screen,
            report=self.report,
        )

    async def _record(self, step, groups) -> None:
        self.recorded.append(step)

    def go(self, start: RunState | None = None) -> "Run":
        async def main() -> None:
            await asyncio.wait_for(self.orchestrator.run(start or RunState.new(0)), 10)

        asyncio.run(main())
        return self


def config_of(**training) -> RunConfig:
    training = {"steps": 3, "prompts_per_step": 4} | training
    return resolve_config({"training": training, "evaluation": {"problems": 1}})


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
    assert folder.latest_state() == RunState(
        step=3,
        policy_version=3,
        position=folder.latest_state().position,
        pending_positions=folder.latest_state().pending_positions,
        seed=0,
    )
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

    async def record(step, groups) -> None:
        if step == 2:
            run.orchestrator.request_stop()

    run.orchestrator._record = record
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
    assert 5 not in folder.latest_state().pending_positions
    assert 5 in run.orchestrator._buffer.dropped_positions or any(5 in batch for batch in run.learner.trained)


def test_an_evaluation_before_is_not_reported_as_one_after(folder):
    config = resolve_config(
        {"training": {"steps": 1, "prompts_per_step": 4}, "evaluation": {"problems": 1, "at_end": False}}
    )
    report = Run(folder, config).go().report
    assert report.evaluation_before["eval/pass@1"] == 0.0
    assert report.evaluation_after == {}
