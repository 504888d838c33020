"""What the pool's client makes of Ray's errors, and where a rollout actor finds weights; no Ray is started here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OwnerDiedError, RayActorError, RayTaskError

from actors.engine import EngineDied
from actors.pool import ActorDied, WeightsGone
from actors.rollout_actor import RolloutActor
from actors.rollout_client import _engine_seed, _result
from ray_rl.config import resolve_config
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import RunError
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, WeightManifest, WeightTransferError


async def failing(error: BaseException) -> None:
    raise error


def in_a_task(cause: BaseException) -> RayTaskError:
    return RayTaskError("collect", "trace", cause, proctitle="a", pid=1, ip="b").as_instanceof_cause()


async def test_the_death_of_an_engine_is_the_death_of_its_actor():
    for error in (EngineDied("the engine's process is gone"), in_a_task(EngineDied("the engine's process is gone"))):
        with pytest.raises(ActorDied, match=r"^the engine's process is gone$"):
            await _result(failing(in_a_task(error)))


async def test_so_is_one_in_a_group_of_tasks():
    group = ExceptionGroup("tasks", [EngineDied("the engine's process is gone")])
    with pytest.raises(ActorDied, match=r"^the engine's process is gone$"):
        await _result(failing(in_a_task(group)))


@pytest.mark.parametrize(
    "error", [ActorDiedError(), OwnerDiedError("00", None, ""), NodeDiedError("the node is gone")], ids=type
)
async def test_a_loss_by_ray_is_the_death_of_the_actor(error):
    with pytest.raises(ActorDied) as death:
        await _result(failing(error))
    assert len(str(death.value).splitlines()) == 1


async def test_of_rays_many_lines_the_one_that_says_why_is_told():
    text = "The actor died.\n\tpid: 1\nThe actor is dead because its node has died. Some common causes include: (1) ..."
    with pytest.raises(ActorDied, match=r"^The actor is dead because its node has died\.$"):
        await _result(failing(RayActorError(error_msg=text)))


async def test_an_error_that_is_written_for_people_comes_as_it_was():
    with pytest.raises(WeightTransferError, match=r"^the probe differs$") as raised:
        await _result(failing(in_a_task(WeightTransferError("the probe differs"))))
    assert type(raised.value) is WeightTransferError


async def test_a_deadline_that_passed_inside_an_actor_does_not_say_that_it_hangs():
    with pytest.raises(RunError, match="reward actor 0") as raised:
        await _result(failing(in_a_task(DeadlineExceeded("waited 3 s for reward actor 0"))))
    assert not isinstance(raised.value, DeadlineExceeded)


async def test_other_errors_of_an_actor_keep_its_traceback():
    for cause in (ValueError("x"), ActorDiedError()):  # the latter: an actor that it asked
        with pytest.raises(RayTaskError, match="trace"):
            await _result(failing(in_a_task(cause)))


def test_a_replacement_and_a_resumed_run_sample_something_else():
    seeds = {_engine_seed(0, step, index) for step in range(3) for index in range(3)}
    assert len(seeds) == 9


class Engine:
    """Takes any weights."""

    pause_seconds = 0.5

    def __init__(self) -> None:
        self.done: list[str] = []
        self.content = b""
        self.error: Exception | None = None

    async def pause(self) -> None:
        self.done.append("pause")

    async def receive_weights(self, manifest: WeightManifest, path: Path) -> None:
        self.done.append("receive")
        self.content = path.read_bytes()
        if self.error:
            raise self.error

    async def resume(self) -> None:
        self.done.append("resume")


@pytest.fixture
def actor(tmp_path: Path) -> Any:
    """With an engine, but without a model."""
    actor = RolloutActor.__new__(RolloutActor)
    actor._config = resolve_config({"weights": {"timeout": 5}})
    actor._files = NodeWeightFile("run", tmp_path)
    actor._engine = Engine()
    actor._proven = asyncio.Event()
    return actor


async def chunk(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def payload(home: str, *chunks: Any, version: int = 1) -> ObjectStorePayload:
    return ObjectStorePayload(manifest=WeightManifest(version=version, tensors=()), chunks=chunks, home=home)


async def test_on_the_learners_node_its_file_is_taken(actor):
    actor._files.ensure(1, lambda: [memoryview(b"weights")], timeout=1)
    assert await actor.receive_weights(payload(actor._files.identity)) == 0.5
    assert actor._engine.content == b"weights"
    assert actor._engine.done == ["pause", "receive", "resume"]


async def test_elsewhere_the_file_is_written_from_the_objects(actor):
    await actor.receive_weights(payload("another node", chunk(b"wei"), chunk(b"ghts")))
    assert actor._engine.content == b"weights"
    assert actor._files.path(1).read_bytes() == b"weights"


async def test_on_the_learners_node_without_its_file_the_objects_are_taken(actor):
    await actor.receive_weights(payload(actor._files.identity, chunk(b"weights")))
    assert actor._engine.content == b"weights"


async def test_weights_that_are_nowhere_are_gone_and_the_engine_goes_on(actor):
    for lost in (
        payload(actor._files.identity),
        payload("another node"),
        payload("another node", failing(OwnerDiedError("00", None, ""))),
    ):
        with pytest.raises(WeightsGone):
            await actor.receive_weights(lost)
    assert actor._engine.done == []


async def test_a_bad_file_is_written_anew_by_the_next_one_unless_it_is_the_learners(actor):
    actor._engine.error = WeightTransferError("digest")
    for home, remains in (("another node", False), (actor._files.identity, True)):
        with pytest.raises(WeightTransferError):
            await actor.receive_weights(payload(home, chunk(b"weights")))
        assert actor._files.path(1).exists() == remains
    assert actor._engine.done[-1] == "resume"


async def test_weights_that_nccl_brought_need_no_file(actor):
    assert await actor.receive_weights(None) == 0.5
    assert actor._engine.done == []


async def test_what_was_sampled_from_weights_that_nobody_has_proven_is_not_given_away(actor):
    class Rollout:
        async def evaluate(self, prompt, *, samples, temperature):
            return ("answer",)

    actor._rollout = Rollout()
    actor._proven.set()
    assert await actor.evaluate(None, 1, 1.0) == ("answer",)
    actor._proven.clear()
    answers = asyncio.ensure_future(actor.evaluate(None, 1, 1.0))
    await asyncio.sleep(0.01)
    assert not answers.done()
    actor._proven.set()
    assert await asyncio.wait_for(answers, 1) == ("answer",)
