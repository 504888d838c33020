"""Reward actors on a real local Ray."""

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import RayTaskError

from actors.reward_actor import (
    RemoteScorer,
    create_reward_actors,
    make_scorer,
    start_reward_actors,
)
from actors.rewards import RewardFunctionError
from actors.scoring import InPlaceScorer
from ray_rl.config import RunConfig
from ray_rl.config.orchestration import RewardActorsConfig
from ray_rl.config.reward import ExactRewardConfig, MathRewardConfig, PythonRewardConfig
from ray_rl.types import Problem, Reward, ScoringItem

pytestmark = pytest.mark.integration

GRADER = """
import os, sys, time

def score(prompt, completion, answer, metadata):
    exec(completion)
    return {"reward": float(answer), "grader": os.getpid(), "actor": os.getppid(), "torch": "torch" in sys.modules}
"""


def item(code: str = "", answer: str = "1") -> ScoringItem:
    return ScoringItem(problem=Problem(problem_id="test:0", prompt="?", answer=answer), completion_text=code)


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture
def configured(tmp_path):
    """A run configuration with so many actors, whose grader runs the completion."""

    def make(actors: int, *, source: str = GRADER, timeout: float = 10.0) -> RunConfig:
        file = tmp_path / "grader.py"
        file.write_text(source)
        reward = PythonRewardConfig(function=f"{file}:score", timeout=timeout, failure=-1.0)
        return RunConfig(reward=reward, reward_actors=RewardActorsConfig(actors=actors))

    return make


@pytest.fixture
async def created(local_ray):
    """Creates and starts actors, and ends them after the test."""
    alive = []

    async def create(config: RunConfig) -> list:
        alive.extend(create_reward_actors(config))
        await start_reward_actors(alive, 60)
        return list(alive)

    yield create
    for handle in alive:
        ray.kill(handle)


async def graders_of(scorer: RemoteScorer, count: int) -> dict[int, int]:
    """Actor process -> grader process."""
    rewards = await scorer.score([item("time.sleep(0.2)") for _ in range(count)])
    return {int(reward.parts["actor"]): int(reward.parts["grader"]) for reward in rewards}


async def test_rewards_come_back_in_order_from_several_actors_that_never_import_torch(created, configured):
    config = configured(2)
    scorer = make_scorer(config.reward, await created(config))
    rewards = await scorer.score([item("time.sleep(0.02)", str(i)) for i in range(70)])
    assert [reward.value for reward in rewards] == [float(i) for i in range(70)]
    assert len({reward.parts["actor"] for reward in rewards}) == 2
    assert {reward.parts["torch"] for reward in rewards} == {0.0}
    for actor in {int(reward.parts["actor"]) for reward in rewards}:
        assert not [mapped for mapped in psutil.Process(actor).memory_maps() if "libtorch" in mapped.path]
    assert await scorer.final_answers([" a ", "b"]) == ["a", "b"]


async def test_a_looping_grader_costs_one_item_its_reward_and_the_actor_lives(created, configured):
    config = configured(1, timeout=1.0)
    [actor] = await created(config)
    scorer = make_scorer(config.reward, [actor])
    before = await graders_of(scorer, 1)
    looping, fine = await scorer.score([item("while True: pass"), item()])
    assert looping == Reward(value=-1.0, failure="timeout: no verdict after 1 s")
    assert fine.value == 1.0
    assert (await graders_of(scorer, 1)).keys() == before.keys()
    assert await actor.counters.remote() == {"graded": 4, "failed/timeout": 1}


async def test_an_actor_that_dies_hands_its_batch_to_another_and_its_grader_dies_too(created, configured, caplog):
    config = configured(2)
    scorer = make_scorer(config.reward, await created(config))
    graders = await graders_of(scorer, 2)
    assert len(graders) == 2
    call = asyncio.create_task(scorer.score([item("time.sleep(0.5)", str(i)) for i in range(4)]))
    await asyncio.sleep(0.3)
    victim, grader = next(iter(graders.items()))
    psutil.Process(victim).kill()
    assert [reward.value for reward in await call] == [0.0, 1.0, 2.0, 3.0]
    assert "was lost with a batch of 2" in caplog.text
    assert not psutil.pid_exists(grader) or psutil.Process(grader).status() == psutil.STATUS_ZOMBIE


async def test_a_single_actor_that_dies_gets_its_batch_again_when_it_is_back(created, configured):
    config = configured(1)
    scorer = make_scorer(config.reward, await created(config))
    [victim] = await graders_of(scorer, 1)
    call = asyncio.create_task(scorer.score([item("time.sleep(0.5)")]))
    await asyncio.sleep(0.2)
    psutil.Process(victim).kill()
    [reward] = await call
    assert reward.value == 1.0
    assert reward.parts["actor"] != victim


async def test_without_a_living_actor_the_items_fail_and_the_reason_names_those_that_died(created, configured, caplog):
    handles = await created(configured(2))
    for handle in handles:
        ray.kill(handle)
    scorer = RemoteScorer(handles, 30, failure=-1.0)
    [reward] = await scorer.score([item()])
    assert reward.value == -1.0
    assert reward.failure is not None
    assert reward.failure.startswith("reward actor lost: reward actor 0 with a batch of 1 (")
    assert ", then reward actor 1 (" in reward.failure
    assert "\n" not in reward.failure
    assert "score of 1 items failed: reward actor lost" in caplog.text
    assert await scorer.final_answers(["a"]) == [""]


async def test_a_grader_that_kills_its_actor_costs_its_batch_and_the_actor_comes_back_every_time(created, configured):
    config = configured(1)
    scorer = make_scorer(config.reward, await created(config))
    for _ in range(3):  # each costs two actors: more than a small number of restarts
        [reward] = await scorer.score([item("os.kill(os.getppid(), 9); time.sleep(9)")])
        assert reward.value == -1.0
        assert reward.failure is not None
        assert reward.failure.startswith("reward actor lost: ")
        [after] = await scorer.score([item()])
        assert after.value == 1.0


async def test_an_actor_that_cannot_bring_its_graders_up_again_counts_as_lost(created, configured):
    config = configured(1)
    scorer = make_scorer(config.reward, await created(config))
    [victim] = await graders_of(scorer, 1)
    file = Path(config.reward.function.partition(":")[0])
    file.write_text(f"import no_such_module\n{GRADER}")
    psutil.Process(victim).kill()
    lost = f"{await scorer.score([item()])}"
    assert "reward actor lost: " in lost
    assert "grader did not start: ModuleNotFoundError" in lost


async def test_work_goes_to_the_actor_with_the_least_of_it(created, configured):
    config = configured(2)
    scorer = make_scorer(config.reward, await created(config))
    slow = asyncio.create_task(scorer.score([item("time.sleep(1.5)")]))
    await asyncio.sleep(0.1)
    started = time.monotonic()
    for _ in range(3):
        await scorer.score([item()])
    assert time.monotonic() - started < 1.0
    await slow


async def test_a_batch_that_takes_too_long_fails_and_the_reason_names_the_actor(created, configured):
    handles = await created(configured(1))
    [reward] = await RemoteScorer(handles, 0.5, failure=-1.0).score([item("time.sleep(3)")])
    assert reward.value == -1.0
    assert reward.failure is not None
    assert reward.failure.startswith("reward actor late: ")
    assert "0.5 s for score of 1 items by reward actor 0" in reward.failure


async def test_an_actor_that_hangs_is_late_although_nothing_can_be_asked_of_it(created, configured):
    scorer = RemoteScorer(await created(configured(1)), 1.0, failure=-1.0)
    [actor] = await graders_of(scorer, 1)
    os.kill(actor, signal.SIGSTOP)
    try:
        [reward] = await scorer.score([item()])
    finally:
        os.kill(actor, signal.SIGCONT)
    assert reward.failure is not None
    assert reward.failure.startswith("reward actor late: waited 1 s for score of 1 items by reward actor 0")


async def test_a_batch_that_queues_behind_others_is_not_late_while_the_actor_gets_on_with_them(created, configured):
    scorer = RemoteScorer(await created(configured(1)), 1.5, failure=-1.0)
    batches = await asyncio.gather(*(scorer.score([item("time.sleep(0.3)")]) for _ in range(12)))
    assert [reward.value for batch in batches for reward in batch] == [1.0] * 12


async def test_a_verifier_that_cannot_be_imported_is_an_error_at_the_start(created, configured):
    with pytest.raises(RayTaskError, match="grader did not start: ModuleNotFoundError"):
        await created(configured(1, source=f"import no_such_module\n{GRADER}"))


def test_a_missing_function_is_an_error_before_any_actor_is_asked_for(configured):
    with pytest.raises(RewardFunctionError, match="defines no 'score'"):
        create_reward_actors(configured(1, source="x = 1"))


async def test_the_exact_reward_needs_no_actors():
    assert create_reward_actors(RunConfig(reward=ExactRewardConfig())) == []
    assert isinstance(make_scorer(ExactRewardConfig(), []), InPlaceScorer)
    with pytest.raises(ValueError, match="at least one reward actor"):
        make_scorer(MathRewardConfig(), [])
