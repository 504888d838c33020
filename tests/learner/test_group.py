"""The ranks as one, over pretended actors: whose failure is told, and as what. No Ray, no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskUnschedulableError

from learner import group as module
from learner.group import LearnerGroup
from ray_rl.config import resolve_config
from ray_rl.deadlines import Deadline, DeadlineExceeded
from ray_rl.errors import NotWritten, RunError
from ray_rl.inventory import FileEntry
from ray_rl.protocols import CollectedGroup, GroupsLost, LearnerDied, Receiver
from ray_rl.types import NO_COST, GroupSummary, Problem, Prompt
from ray_rl.weight_manifest import ObjectStorePayload, Probe, WeightManifest

HOME = "the learner's node"


class Verb:
    """`actor.verb` of Ray: calls begin at once and are waited for later."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.answer = answer

    def remote(self, *args: object) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.answer(*args))


class FakeRank:
    """Does what a rank does, as far as the group can tell; `fails` maps a verb to an error, or to None where it hangs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.policy = 0
        self.lost: list[int] = []
        self.fails: dict[str, BaseException | None] = {}
        self.calls: list[str] = []
        self.chunks: tuple[str, ...] = ()
        self.ports: list[int | None] = []

    def __getattr__(self, verb: str) -> Verb:
        if verb.startswith("_"):
            raise AttributeError(verb)

        async def answer(*args: Any) -> Any:
            self.calls.append(verb)
            if verb in self.fails:
                error = self.fails[verb]
                await asyncio.sleep(3600 if error is None else 0.02 * isinstance(error, ActorDiedError))
                assert error is not None
                raise error
            return getattr(self, f"_{verb}", lambda *_: None)(*args)

        return Verb(answer)

    def _fetch(self, refs: list[int]) -> list[int]:
        return [index for index, ref in enumerate(refs) if ref in self.lost]

    def _train(self, step: int) -> dict[str, float]:
        self.policy += 1
        return {"loss/policy": float(step)}

    def _publish(self, version: int, homes: list[str], stored: bool) -> ObjectStorePayload | None:
        if self.rank:
            return None
        chunks = ("chunk",) if stored or set(homes) - {HOME} else ()
        return ObjectStorePayload(manifest=WeightManifest(version=version, tensors=()), chunks=chunks, home=HOME)

    def _probe(self) -> Probe:
        return Probe(token_ids=(1, 2), logprobs=(-float(self.policy),))

    def _free_port(self) -> int:
        return 1000 + self.calls.count("free_port")

    def _send(self, version: int, actors: list[str], port: int | None) -> None:
        self.ports.append(port)


def make_group(*overrides: str, ranks: int = 2, may_grow: bool = False) -> tuple[LearnerGroup, list[FakeRank]]:
    config = resolve_config({}, [f"learner.ranks={ranks}", "learner.step_timeout=60", *overrides])
    group = LearnerGroup(config, "model", "run", may_grow=may_grow)
    fakes = [FakeRank(rank) for rank in range(ranks)]
    group._ranks = list(fakes)
    return group, fakes


def collected(position: int) -> CollectedGroup:
    prompt = Prompt(problem=Problem(problem_id="p", prompt="?", answer="!"), position=position, token_ids=(1,))
    summary = GroupSummary(
        prompt_id="p",
        position=position,
        oldest_version=0,
        newest_version=0,
        rewards=(1.0,),
        lengths=(1,),
        truncated=0,
        failures=0,
        graded=1,
        segments=1,
        value_mean=0.0,
        value_stderr=0.0,
        cost=NO_COST,
    )
    return CollectedGroup(prompt=prompt, ref=position, summary=summary)


def receivers(*homes: str) -> list[Receiver]:
    return [Receiver(home=home, handle=f"actor {index}") for index, home in enumerate(homes)]


def raised_by_a_rank(error: Exception) -> RayTaskError:
    return RayTaskError("verb", "a traceback", error).as_instanceof_cause()


async def test_a_step_is_trained_on_groups_that_every_rank_has() -> None:
    group, fakes = make_group()
    stats = await group.train(3, [collected(7), collected(8)])
    assert stats.metrics == {"loss/policy": 3.0}
    assert [fake.calls for fake in fakes] == [["fetch", "train"]] * 2


async def test_what_any_rank_lacks_is_lost_and_nothing_is_trained() -> None:
    group, fakes = make_group()
    fakes[0].lost, fakes[1].lost = [9, 7], [8, 9]
    with pytest.raises(GroupsLost, match="3 of the 4 groups of step 3, those of the prompts at 7, 8, 9") as caught:
        await group.train(3, [collected(position) for position in (7, 6, 8, 9)])
    assert caught.value.positions == (7, 8, 9)
    assert [fake.policy for fake in fakes] == [0, 0]


async def test_a_dead_rank_is_named_with_what_ray_knows() -> None:
    group, fakes = make_group()
    fakes[1].fails["train"] = ActorDiedError()
    fakes[0].fails["train"] = None
    with pytest.raises(LearnerDied, match="rank 1 of the learner died: The actor died unexpectedly"):
        await group.train(0, [])


async def test_a_peers_error_before_the_death_is_known_is_the_death() -> None:
    group, fakes = make_group(ranks=3)
    fakes[0].fails["train"] = raised_by_a_rank(RuntimeError("Connection closed by peer"))
    fakes[1].fails["train"] = None
    fakes[2].fails["train"] = ActorDiedError()
    with pytest.raises(LearnerDied, match="rank 2 of the learner died"):
        await group.train(0, [])


async def test_a_bug_in_a_rank_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEATH_SECONDS", 0.05)
    group, fakes = make_group()
    fakes[0].fails["train"] = raised_by_a_rank(TypeError("a bug"))
    fakes[1].fails["train"] = None
    with pytest.raises(TypeError, match="a traceback"):
        await group.train(0, [])


async def test_an_error_of_a_rank_that_has_one_clear_line_comes_as_what_it_was() -> None:
    group, fakes = make_group()
    fakes[1].fails["save"] = raised_by_a_rank(NotWritten("no room"))
    with pytest.raises(NotWritten, match=r"^no room$") as caught:
        await group.save(None)  # type: ignore[arg-type]
    assert type(caught.value) is NotWritten


async def test_what_the_ranks_put_into_a_store_is_told_together() -> None:
    group, fakes = make_group()
    for rank, fake in enumerate(fakes):
        entry = FileEntry(bytes=rank, xxh3=str(rank))
        fake._save = lambda folder, rank=rank, entry=entry: {f"rank_{rank}": entry}  # type: ignore[attr-defined]
    assert sorted(await group.save(None)) == [f"rank_{rank}" for rank in range(len(fakes))]  # type: ignore[arg-type]


async def test_a_rank_that_cannot_write_into_the_store_is_told_before_the_first_step() -> None:
    group, fakes = make_group()
    fakes[1].fails["reach"] = raised_by_a_rank(RunError("rank 1 of the learner, on b: s3://x: refused"))
    with pytest.raises(RunError, match="rank 1 of the learner, on b"):
        await group.reach(None)  # type: ignore[arg-type]


async def test_a_rank_that_hangs_counts_as_dead() -> None:
    group, fakes = make_group("learner.step_timeout=0.05")
    fakes[1].fails["export"] = None
    with pytest.raises(LearnerDied, match=r"rank 1 of the learner hangs: waited 0.05 s for the export"):
        await group.export("folder")  # type: ignore[arg-type]


async def test_ranks_that_could_not_be_started_save_nothing_in_silence() -> None:
    group, _ = make_group()
    group._ranks.clear()
    with pytest.raises(LearnerDied, match="no processes"):
        await group.save(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("homes", "may_grow", "reached"),
    [([HOME, HOME], False, False), ([], False, False), ([HOME, "other"], False, True), ([HOME], True, True)],
)
async def test_a_publication_says_where_those_who_join_later_find_it(
    homes: list[str], may_grow: bool, reached: bool
) -> None:
    group, _ = make_group(may_grow=may_grow)
    weights = await group.publish(4, receivers(*homes))
    assert weights.version == 4
    assert weights.reaches(HOME)
    assert weights.reaches("any other") is reached


async def test_the_probe_is_asked_of_the_ranks_once_and_stays_that_of_its_version() -> None:
    group, fakes = make_group()
    weights = await group.publish(0, receivers(HOME))
    first = await weights.probe()
    await group.train(1, [collected(0)])
    assert await weights.probe() == first
    assert fakes[0].calls.count("probe") == 1


async def test_a_probe_that_nobody_asked_for_is_kept_before_the_policy_changes() -> None:
    group, fakes = make_group()
    weights = await group.publish(0, [])
    await group.train(1, [collected(0)])
    assert (await weights.probe()).logprobs == (0.0,)
    newer = await group.publish(1, [])
    assert (await newer.probe()).logprobs == (-1.0,)
    assert fakes[0].calls.count("probe") == 2


async def test_the_nccl_group_is_formed_anew_exactly_when_the_engines_are_others() -> None:
    group, fakes = make_group(
        "weights.kind=nccl", "learner.gpus_per_rank=1", "rollout.gpus_per_actor=1", "learner.zero_stage=1"
    )
    for homes in (["a", "b"], ["a", "b"], ["a"]):
        weights = await group.publish(0, receivers(*homes))
    assert [fake.ports for fake in fakes] == [[1001, None, 1002]] * 2
    assert weights.payload is None
    assert not weights.reaches("a")


async def test_a_transfer_by_nccl_that_breaks_off_costs_the_learner() -> None:
    group, fakes = make_group("weights.kind=nccl", "learner.gpus_per_rank=1", "rollout.gpus_per_actor=1", ranks=1)
    fakes[0].fails["send"] = raised_by_a_rank(ActorDiedError())
    with pytest.raises(LearnerDied, match="the transfer by NCCL broke off"):
        await group.publish(0, receivers("a"))
    del fakes[0].fails["send"]
    await group.publish(0, receivers("a"))
    assert fakes[0].ports == [1002]


class FakePlaces:
    """Says whether they are kept."""

    def __init__(self) -> None:
        self.kept = True
        self.error: BaseException | None = None
        self.lost: DeadlineExceeded | None = None

    async def ready(self) -> None:
        if self.error:
            raise self.error

    async def until_lost(self) -> None:
        if self.lost is not None:
            raise self.lost
        await asyncio.Event().wait()

    def options(self, rank: int) -> dict[str, Any]:
        return {}

    def release(self) -> None:
        self.kept = False


def restarting(monkeypatch: pytest.MonkeyPatch) -> tuple[LearnerGroup, list[FakeRank], FakePlaces]:
    """A group of one rank whose next start goes wrong as its fakes are told."""
    group, (rank,) = make_group("learner.start_timeout=0.2", ranks=1)
    rank._host = lambda: ("address", 1)  # type: ignore[attr-defined]
    places = FakePlaces()
    group._ranks, group._places = [], places  # type: ignore[assignment]
    monkeypatch.setattr(module, "start_ranks", lambda *_: [rank])
    monkeypatch.setattr(module.ray, "kill", lambda actor: None)
    return group, [rank], places


async def test_ranks_that_die_as_they_come_up_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    group, (rank,), places = restarting(monkeypatch)
    rank.fails["start"] = ActorDiedError()
    with pytest.raises(LearnerDied, match="rank 0 of the learner died"):
        await group.restart()
    assert places.kept
    del rank.fails["start"]
    await group.restart()
    assert (await group.train(1, [])).metrics == {"loss/policy": 1.0}


async def test_ranks_that_do_not_come_up_in_time_give_their_places_up(monkeypatch: pytest.MonkeyPatch) -> None:
    group, (rank,), places = restarting(monkeypatch)
    rank.fails["host"] = None
    with pytest.raises(LearnerDied):
        await group.restart()
    assert not places.kept


async def test_ranks_whose_places_are_lost_as_they_come_up_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group, (rank,), places = restarting(monkeypatch)
    rank.fails["host"] = None
    places.lost = Deadline(0, what="lost places").exceeded()
    with pytest.raises(LearnerDied, match="lost places"):
        await group.restart()
    assert not places.kept


async def test_places_that_ray_cannot_find_are_a_death_of_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    group, _, places = restarting(monkeypatch)
    places.error = TaskUnschedulableError("no such node")
    with pytest.raises(LearnerDied, match="did not come up again"):
        await group.restart()


async def test_stacks_say_what_each_rank_does_or_why_they_are_missing() -> None:
    group, fakes = make_group()
    fakes[0]._stacks = lambda: "thread main\n"  # type: ignore[attr-defined]
    fakes[1].fails["stacks"] = ActorDiedError()
    texts = await group.stacks()
    assert texts["learner rank 0"] == "thread main\n"
    assert "died" in texts["learner rank 1"]
