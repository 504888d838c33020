"""Whole runs on fakes in which things die: what is trained, what is sampled again, and that the ledger loses nothing."""

import asyncio
import json
import random
from itertools import chain
from pathlib import Path

import pytest

from ray_rl.collector import RunStopped
from ray_rl.config import resolve_config
from ray_rl.errors import NotWritten, RunError
from ray_rl.evaluation import evaluate
from ray_rl.ledger import audit, read_ledger
from ray_rl.protocols import NoActorsLeft, PromptFailed
from ray_rl.run_state import RunFolder, RunState
from tests.fakes import FakeLearner, FakePool, collected, prompt
from tests.orchestrated_run import Run, config_of


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_of())


def saving(**training):
    """Every second step is saved."""
    data = {"training": {"steps": 6, "prompts_per_step": 4} | training, "evaluation": {"problems": 1}}
    return resolve_config(data | {"checkpoint": {"every": 2}})


def dying(*verbs: str) -> FakeLearner:
    learner = FakeLearner()
    learner.dies_in = list(verbs)
    return learner


def trained(folder: RunFolder) -> list[list[int]]:
    return [list(line.trained) for line in read_ledger(folder.path / "ledger.jsonl")]


def final_weights(folder: RunFolder) -> list[list[int]]:
    return json.loads((folder.final / "policy.json").read_text())


def book_is_closed(folder: RunFolder) -> bool:
    found = audit(folder.path / "ledger.jsonl", folder.find_start().state)
    return (found.lost, found.duplicated) == ((), ())


@pytest.mark.parametrize(
    "verb", ["train 1", "train 3", "train 4", "publish 0", "publish 3", "publish 4", "save", "export"]
)
def test_a_learner_that_dies_anywhere_costs_no_prompt_and_no_step(folder, verb):
    run = Run(folder, saving(), learner=dying(verb)).go()
    calm = [[4 * step + index for index in range(4)] for step in range(6)]
    assert [sorted(batch) for batch in trained(folder)] == calm
    assert [sorted(batch) for batch in final_weights(folder)] == calm
    assert book_is_closed(folder)
    assert [step for step, metrics in run.sink.logged if "timing/step" in metrics] == [1, 2, 3, 4, 5, 6]
    assert any("the learner died, restart 1 of 3" in warning for warning in run.screen.warnings)


def test_after_a_death_the_steps_since_the_checkpoint_are_done_again_and_no_more(folder):
    run = Run(folder, saving(), learner=dying("train 4")).go()
    assert run.pool.published == [0, 1, 2, 3, 2, 3, 4, 5, 6]
    assert len(run.learner.trained) == 7


def test_groups_that_are_young_enough_survive_the_learner(folder):
    run = Run(folder, saving(max_staleness=3), learner=dying("train 2")).go()
    sampled = [position for position, _ in run.pool.sampled]
    # Step 1, which no checkpoint holds, and what was sampled with its policy; not the eleven others that waited.
    assert len(sampled) == len(set(sampled)) + 8
    assert book_is_closed(folder)


def test_a_learner_that_dies_while_it_comes_back_is_started_once_more(folder):
    Run(folder, saving(), learner=dying("train 3", "restart", "load")).go()
    assert [sorted(batch) for batch in trained(folder)] == [[4 * s + i for i in range(4)] for s in range(6)]


def test_a_learner_that_dies_too_often_ends_the_run_with_the_mend(folder):
    learner = dying("train 3", "restart", "load", "publish 2")
    with pytest.raises(RunStopped, match=r"learner.max_restarts: the learner died 4 times"):
        Run(folder, saving(), learner=learner).go()
    assert folder.find_start().state.step == 2


def test_lost_groups_are_sampled_again_and_the_rest_of_their_batch_is_trained(folder):
    learner = FakeLearner()
    learner.lost = {5, 6}
    run = Run(folder, saving(), learner=learner).go()
    assert sorted(chain.from_iterable(trained(folder))) == list(range(24))
    assert {4, 7} <= set(trained(folder)[1])
    assert [position for position, _ in run.pool.sampled].count(5) == 2
    assert book_is_closed(folder)


def test_a_prompt_that_no_actor_survives_is_dropped_and_another_one_taken(folder):
    class Fatal(FakePool):
        async def collect(self, prompt):
            if prompt.position == 2:
                raise PromptFailed("prompt 2:p2 cost 3 actors")
            return await super().collect(prompt)

    run = Run(folder, config_of(), Fatal()).go()
    assert sorted(chain.from_iterable(trained(folder))) == [p for p in range(13) if p != 2]
    assert any("prompt 2:p2 cost 3 actors" in warning for warning in run.screen.warnings)
    assert folder.find_start().state.dropped == {"failed": 1}
    assert book_is_closed(folder)


def test_prompts_that_all_fail_end_the_run(folder):
    class Fatal(FakePool):
        async def collect(self, prompt):
            raise PromptFailed("cost 3 actors")

    with pytest.raises(RunStopped, match="3 prompts failed one after the other"):
        Run(folder, config_of(), Fatal()).go()


def test_with_no_actor_left_what_is_trained_is_saved(folder):
    class Vanishing(FakePool):
        async def collect(self, prompt):
            if self.version == 1:
                raise NoActorsLeft("no rollout actor for 900 s")
            return await super().collect(prompt)

    with pytest.raises(NoActorsLeft):
        Run(folder, config_of(), Vanishing()).go()
    assert folder.find_start().state.step == 1


def test_when_no_engine_takes_a_version_the_step_before_it_is_saved_as_done(folder):
    class Deaf(FakePool):
        async def publish(self, make):
            if self.version == 1:
                await make([])
                raise NoActorsLeft("no rollout actor for 900 s")
            return await super().publish(make)

    with pytest.raises(NoActorsLeft):
        Run(folder, config_of(), Deaf()).go()
    assert folder.find_start().state.step == 2
    assert len(json.loads((folder.policy(2) / "policy.json").read_text())) == 2


def test_a_learner_that_failed_amid_a_step_is_not_saved_as_if_it_had_done_none(folder):
    class Diverging(FakeLearner):
        async def train(self, step, groups):
            done = await super().train(step, groups)
            if step == 4:
                raise RunError("the gradient is not finite")
            return done

    run = Run(folder, saving(), learner=Diverging())
    with pytest.raises(RunError, match="not finite"):
        run.go()
    assert folder.find_start().state.step == 2
    assert any("amid a step" in warning for warning in run.screen.warnings)


def test_a_learner_that_dies_in_a_publication_for_a_joiner_costs_no_group(folder):
    class Joining(FakePool):
        joined = False

        async def collect(self, prompt):
            group = await super().collect(prompt)
            if prompt.position == 7 and not self.joined:
                self.waits_for_weights = self.joined = True
                while self.waits_for_weights:
                    await asyncio.sleep(0.01)
            return group

        async def publish(self, make):
            if self.waits_for_weights:
                self.waits_for_weights = False
                learner.dies_in = ["publish 1"]
                await asyncio.sleep(0.05)  # the batch is full by now
            return await super().publish(make)

    learner = FakeLearner()
    Run(folder, saving(), Joining(), learner).go()
    assert [sorted(batch) for batch in trained(folder)] == [[4 * s + i for i in range(4)] for s in range(6)]
    assert book_is_closed(folder)


def test_an_evaluation_leaves_out_a_prompt_that_no_actor_survives():
    class Fatal(FakePool):
        async def evaluate(self, prompt, *, samples, temperature):
            if prompt.position == 1:
                raise PromptFailed("cost 3 actors")
            return await super().evaluate(prompt, samples=samples, temperature=temperature)

    config = resolve_config({}).evaluation
    assert asyncio.run(evaluate(Fatal(), [prompt(0), prompt(1)], config))["eval/pass@1"] == 0.0
    with pytest.raises(RunError, match="none of 1 evaluation prompts"):
        asyncio.run(evaluate(Fatal(), [prompt(1)], config))


def test_an_engine_that_joins_out_of_reach_gets_the_present_version_once_more(folder):
    class Joined(FakePool):
        async def collect(self, prompt):
            group = await super().collect(prompt)
            if prompt.position == 3:
                self.waits_for_weights = True
                while self.waits_for_weights:
                    await asyncio.sleep(0.01)
            return group

    run = Run(folder, config_of(steps=1), Joined()).go()
    assert run.pool.published == [0, 0, 1]


def test_a_periodic_checkpoint_without_room_is_said_and_the_last_one_fails(folder):
    class Full(FakeLearner):
        async def save(self, folder):
            raise NotWritten(f"{folder}: could not be written: No space left on device")

    run = Run(folder, saving(), learner=Full())
    with pytest.raises(NotWritten, match="No space left"):
        run.go()
    assert len(run.learner.trained) == 6
    assert any("no checkpoint after step 2, and the run goes on" in warning for warning in run.screen.warnings)


def test_six_steps_and_three_and_three_see_the_same_prompts_in_the_same_steps(tmp_path):
    whole = RunFolder.create(tmp_path / "whole", config_of())
    Run(whole, config_of(steps=6)).go()
    parts = RunFolder.create(tmp_path / "parts", config_of())
    Run(parts, config_of(steps=3)).go()
    Run(parts, config_of(steps=6)).go(parts.find_start().state)
    assert (parts.path / "ledger.jsonl").read_bytes() == (whole.path / "ledger.jsonl").read_bytes()
    assert final_weights(parts) == final_weights(whole)


@pytest.mark.parametrize("seed", range(30))
def test_under_random_deaths_every_prompt_ends_exactly_once(tmp_path, seed):
    dice = random.Random(seed)
    staleness, decided = dice.choice([0, 1, 3]), dice.choice(["keep", "drop", "refill"])
    folder = RunFolder.create(tmp_path / "run", config_of())

    class Shaky(FakePool):
        async def collect(self, prompt):
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            if dice.random() < 0.05 and prompt.position not in fatal:
                fatal.add(prompt.position)
                raise PromptFailed(f"prompt {prompt.position}")
            rewards = (1.0, 1.0) if dice.random() < 0.3 else (0.0, 1.0)
            return collected(prompt.position, version=max(0, self.version - dice.choice([0, 0, 1])), rewards=rewards)

    fatal: set[int] = set()
    state = RunState.new(0)
    for until in (5, 10):
        learner = dying(
            *(f"{verb} {dice.randrange(until)}" for verb in dice.choices(["train", "publish"], k=2)), "save"
        )
        learner.lost = {dice.randrange(40) for _ in range(3)}
        learner.weights = (
            [list(line.trained) for line in read_ledger(folder.path / "ledger.jsonl")] if state.step else []
        )
        config = saving(steps=until, max_staleness=staleness, decided_groups=decided)
        Run(folder, config, Shaky(), learner).go(state)
        state = folder.find_start().state
        assert state.step == until
        assert book_is_closed(folder)
        steps_with_groups = [batch for batch in trained(folder) if batch]
        assert [b for b in json.loads((folder.policy(until) / "policy.json").read_text()) if b] == steps_with_groups
