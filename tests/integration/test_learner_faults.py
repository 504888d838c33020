"""What becomes of a real learner whose processes are killed or stopped, and whose groups, disk or checkpoints are gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from learner import group as group_module
from learner.checkpoint import TAG, CheckpointError, CheckpointNotWritten
from learner.group import LearnerGroup
from ray_rl import deadlines
from ray_rl.protocols import GroupsLost, LearnerDied, Receiver
from ray_rl.types import TrajectoryGroup
from ray_rl.weight_file import NodeWeightFile, sweep
from tests.integration.learner_runs import collected, make_config, make_group
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

RUN = "test-faults"
TOKENS = (1, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Of one node, to which more can be added."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@asynccontextmanager
async def learner(
    model_path: Path, ranks: int, stage: int, *overrides: str, may_grow: bool = False
) -> AsyncIterator[LearnerGroup]:
    group = await LearnerGroup.start(make_config(ranks, stage, *overrides), str(model_path), RUN, may_grow=may_grow)
    try:
        yield group
    finally:
        group.shutdown()
        sweep(RUN)


def batch(first: int = 0) -> list[Any]:
    return [collected(first + k) for k in range(3)]


async def process_of(group: LearnerGroup, rank: int) -> int:
    return await group._ranks[rank].__ray_call__.remote(lambda self: os.getpid())


async def train_for_ever(group: LearnerGroup) -> None:
    for step in range(1, 10_000):
        await group.train(step, batch())


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 3)])
async def test_a_killed_rank_is_told_at_once_and_new_ranks_go_on_from_the_checkpoint(
    model_path: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    async with learner(model_path, ranks, stage) as group:
        await group.train(0, batch())
        await group.save(tmp_path / "checkpoint")
        before = await group.logprobs(TOKENS)
        killed = await process_of(group, ranks - 1)
        training = asyncio.create_task(train_for_ever(group))
        await asyncio.sleep(0.5)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(LearnerDied, match=f"rank {ranks - 1} of the learner died: .*actor died") as caught:
            await deadlines.wait(training, 60, what="the death to be told")
        assert "\n" not in str(caught.value)
        with pytest.raises(LearnerDied):
            await deadlines.wait(group.save(tmp_path / "never"), 60, what="the death to be told again")
        await group.restart()
        assert await group.logprobs(TOKENS) != before
        await group.load(tmp_path / "checkpoint")
        assert await group.logprobs(TOKENS) == before
        await group.train(1, batch())
        assert not (tmp_path / "never").exists()


async def test_a_rank_that_hangs_is_told_and_replaced(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_FETCH_GRACE_SECONDS", 1.0)
    async with learner(model_path, 1, 0, "learner.step_timeout=5") as group:
        await group.train(0, batch())
        os.kill(await process_of(group, 0), signal.SIGSTOP)
        with pytest.raises(
            LearnerDied, match=r"rank 0 of the learner hangs: waited 6 s for the groups of training step 1"
        ):
            await deadlines.wait(group.train(1, batch()), 60, what="the hang to be told")
        await group.restart()
        await group.train(1, batch())


async def test_groups_that_lay_on_a_lost_node_are_named_and_the_rest_can_be_trained_on(
    model_path: Path, cluster: Cluster
) -> None:
    @ray.remote(num_cpus=0, resources={"lost": 1})
    class Maker:
        def make(self, position: int) -> TrajectoryGroup:
            group = make_group(position)
            first, *others = group.trajectories
            # Ray keeps what is small with the caller.
            return replace(group, trajectories=(replace(first, text="long" * 100_000), *others))

    async with learner(model_path, 2, 0) as group:
        node = cluster.add_node(num_cpus=1, resources={"lost": 1}, object_store_memory=100 * 2**20)
        maker = Maker.remote()
        refs = {position: maker.make.remote(position) for position in (4, 5)}
        ray.wait(list(refs.values()), num_returns=2, timeout=60, fetch_local=False)
        cluster.remove_node(node, allow_graceful=False)
        before = await group.logprobs(TOKENS)
        with pytest.raises(GroupsLost, match="2 of the 3 groups of step 1") as caught:
            await deadlines.wait(
                group.train(1, [collected(4, refs[4]), collected(0), collected(5, refs[5])]),
                120,
                what="the loss to be told",
            )
        assert caught.value.positions == (4, 5)
        assert await group.logprobs(TOKENS) == before
        await group.train(1, [collected(0), collected(3)])
        assert await group.logprobs(TOKENS) != before


async def test_two_ranks_agree_on_what_the_disk_refuses_and_on_damaged_checkpoints(
    model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    async with learner(model_path, 2, 3) as group:
        await group.train(0, batch())
        for write in (group.save, group.export):
            with pytest.raises(CheckpointNotWritten, match=r"file/checkpoint: could not be written: .*Not a directory"):
                await deadlines.wait(write(tmp_path / "file" / "checkpoint"), 60, what="the refusal")
        await group.save(tmp_path / "checkpoint")
        saved = await group.logprobs(TOKENS)
        await group.restart()
        for damaged in sorted((tmp_path / "checkpoint" / TAG).glob("*_rank_1_*.pt")):
            content = damaged.read_bytes()
            damaged.write_bytes(content[: len(content) // 2])
            with pytest.raises(CheckpointError, match=f"{damaged.name} is damaged"):
                await deadlines.wait(group.load(tmp_path / "checkpoint"), 60, what="the damage to be found")
            damaged.write_bytes(content)
        await group.load(tmp_path / "checkpoint")
        assert await group.logprobs(TOKENS) == saved


async def test_what_is_published_stays_for_those_who_join_and_is_proven_as_it_was(model_path: Path) -> None:
    async with learner(model_path, 2, 3) as group:
        here = NodeWeightFile(RUN)
        weights = await group.publish(0, [])
        expected = await group.logprobs((await weights.probe()).token_ids)
        await group.train(1, batch())
        assert list((await weights.probe()).logprobs) == expected
        assert weights.reaches(here.identity)
        assert not weights.reaches("elsewhere")
        assert here.path(0).stat().st_size >= weights.payload.manifest.nbytes
        place = here.path(0).stat().st_ino
        newer = await group.publish(1, [Receiver(home=here.identity, handle=None)])
        assert here.path(1).stat().st_ino == place
        assert list((await newer.probe()).logprobs) != expected
        remote = await group.publish(2, [Receiver(home="elsewhere", handle=None)])
        assert remote.reaches("any other node")
        chunks = [deadlines.get(ref, 30, what="a chunk") for ref in remote.payload.chunks]
        assert sum(len(chunk) for chunk in chunks) >= remote.payload.manifest.nbytes
        assert not here.path(2).exists()
        here.close()


async def test_a_run_that_may_grow_stores_every_version_for_other_nodes(model_path: Path) -> None:
    async with learner(model_path, 1, 0, may_grow=True) as group:
        here = NodeWeightFile(RUN)
        weights = await group.publish(0, [Receiver(home=here.identity, handle=None)])
        assert weights.reaches("any other node")
        assert here.path(0).exists()
        here.close()


async def test_ranks_tell_what_they_are_doing_while_they_train(model_path: Path) -> None:
    async with learner(model_path, 2, 0) as group:
        training = asyncio.create_task(train_for_ever(group))
        await asyncio.sleep(1)
        texts = [await deadlines.wait(group.stacks(), 30, what="the stacks") for _ in range(20)]
        assert all(text.startswith("process ") for of_ranks in texts for text in of_ranks.values())
        assert any("in train" in of_ranks["learner rank 1"] for of_ranks in texts)
        await deadlines.end(training, 60, what="training")
