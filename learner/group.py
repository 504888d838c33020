"""The ranks of the learner as one: `ray_rl.protocols.Learner`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from learner.places import Places
from learner.rank_processes import start_ranks
from ray_rl.config.run import RunConfig
from ray_rl.deadlines import Deadline, DeadlineExceeded, first_of, wait
from ray_rl.errors import RunError
from ray_rl.inventory import FileEntry
from ray_rl.object_store import ObjectStore, Place
from ray_rl.protocols import CollectedGroup, GroupsLost, LearnerDied, PublishedWeights, Receiver, TransferBroke
from ray_rl.types import StepStats
from ray_rl.weight_manifest import ObjectStorePayload, Probe

_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, RuntimeEnvSetupError)
"""What Ray raises where a rank's process is gone, or did not even come up."""
_DEATH_SECONDS = 5.0
"""How long after one rank's error another rank's death may show, whose consequence it then is."""
_STACKS_SECONDS = 10.0
_FETCH_GRACE_SECONDS = 30.0


class LearnerGroup:
    """Made by `start`. A verb that failed, but for GroupsLost and NotWritten, leaves only `restart` and `shutdown` to call."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        run_id: str,
        *,
        may_grow: bool,
        logs: Path | None = None,
        homes: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """As `start`, which also starts the ranks; here `begin` does, and may be preceded by `reserve`.

        Args:
            config: as `start`.
            model_path: as `start`.
            run_id: as `start`.
            may_grow: as `start`.
            logs: as `start`.
            homes: says which nodes the ranks had best be on (`Places`).
        """
        self._config = config
        self._model_path = model_path
        self._run_id = run_id
        self._may_grow = may_grow
        self._logs = logs
        self._homes = homes
        self._places: Places | None = None
        self._ranks: list[Any] = []
        self._sent_to: list[Any] | None = None
        self._probe: _KeptProbe | None = None

    @classmethod
    async def start(
        cls, config: RunConfig, model_path: str, run_id: str, *, may_grow: bool, logs: Path | None = None
    ) -> LearnerGroup:
        """One actor per rank; returns when all have loaded the policy and met.

        Args:
            config: the run's.
            model_path: folder (on every node) or Hugging Face name of the initial policy.
            run_id: under which the run's files lie in each node's memory.
            may_grow: whether engines may come up on other nodes than the present ones while the run goes on.
            logs: the run's logs/, if it has a folder.

        Raises:
            DeadlineExceeded, LearnerDied, ray.exceptions.RayTaskError: as `begin`.
        """
        group = cls(config, model_path, run_id, may_grow=may_grow, logs=logs)
        try:
            await group.begin()
        except BaseException:
            group.shutdown()
            raise
        return group

    async def reserve(self) -> None:
        """Have places for all ranks, which nobody else can take until `shutdown`.

        Raises:
            DeadlineExceeded: `learner.start_timeout` passed; there is no room for them.
        """
        if self._places is None:
            self._places = Places(self._config.learner, self._homes())
        await self._places.ready()

    async def restart(self) -> None:
        """End what is left of the ranks and start new ones in their places, with the initial policy.

        Raises:
            LearnerDied: they did not come up.
        """
        try:
            await self.begin()
        except (DeadlineExceeded, RayError) as error:
            raise LearnerDied(f"the learner's ranks did not come up again: {_one_line(error)}") from error

    async def begin(self) -> None:
        """Start the ranks, in places that are reserved by then; returns when all have loaded the policy and met.

        Where they fail the places are kept, for rollout actors that wait for a node would take them; but not where something
        took too long, perhaps on a node that is gone without Ray's knowing.

        Raises:
            DeadlineExceeded: `learner.start_timeout` passed.
            LearnerDied: a rank's process ended.
            ray.exceptions.RayTaskError: a rank failed.
        """
        self._end_ranks()
        try:
            await self.reserve()
            self._ranks = self._new_ranks()
            await wait(
                self._meet_in_place(),
                self._config.learner.start_timeout,
                what="the learner's ranks to load the policy and to meet",
                causes="a large model; then raise learner.start_timeout",
            )
        except BaseException as error:
            self._end_ranks()
            if isinstance(error, DeadlineExceeded) or isinstance(error.__cause__, DeadlineExceeded):
                self._release()
            raise

    async def train(self, step: int, groups: Sequence[CollectedGroup]) -> StepStats:
        """One training step; every rank fetches the groups and trains on its share.

        Raises:
            GroupsLost: some cannot be fetched any more; nothing was trained.
            LearnerDied: a rank's process is gone, or hangs.
        """
        await self._keep_probe()
        seconds = self._config.learner.step_timeout + _FETCH_GRACE_SECONDS
        refs = [group.ref for group in groups]
        lost = await self._on_all_ranks("fetch", refs, what=f"the groups of training step {step}", seconds=seconds)
        if indices := sorted(set().union(*lost)):
            positions = [groups[index].prompt.position for index in indices]
            raise GroupsLost(
                f"gone with the node they lay on: {len(positions)} of the {len(groups)} groups of step {step}, those of the "
                f"prompts at {', '.join(map(str, positions))}",
                positions,
            )
        metrics, *_ = await self._on_all_ranks("train", step, what=f"training step {step}")
        return StepStats(metrics=metrics)

    async def publish(self, version: int, receivers: Sequence[Receiver]) -> PublishedWeights:
        """The current policy as a new version; under NCCL the receivers run on it afterwards.

        Raises:
            NotWritten: the memory of the learner's node is full.
            LearnerDied: a rank's process is gone, or hangs; or the transfer by NCCL broke off, which leaves the ranks unusable.
        """
        payload: ObjectStorePayload | None = None
        homes: frozenset[str] | None = frozenset()
        if self._config.weights.kind == "nccl":
            await self._send(version, [receiver.handle for receiver in receivers])
        else:
            what = f"the publication of version {version}"
            seen = [receiver.home for receiver in receivers]
            payload, *_ = await self._on_all_ranks("publish", version, seen, self._may_grow, what=what)
            assert payload is not None
            homes = None if payload.chunks else frozenset({payload.home})
        self._probe = _KeptProbe(self)
        return PublishedWeights(version=version, payload=payload, probe=self._probe.ask, homes=homes)

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:] under the current policy at temperature 1; [P - 1] for [P] tokens."""
        logprobs, *_ = await self._on_all_ranks("logprobs", tuple(token_ids), what="the learner's log-probabilities")
        return logprobs

    async def probe(self) -> Probe:
        """What an engine with the current policy must compute."""
        probe, *_ = await self._on_all_ranks("probe", what="the learner's log-probabilities of the probe prompt")
        return probe

    async def reach(self, store: ObjectStore) -> None:
        """See that every rank can write into a store, so that this does not show at the first checkpoint.

        Raises:
            RunError: one cannot; the message names it and its node.
            LearnerDied: a rank's process is gone, or hangs.
        """
        await self._on_all_ranks("reach", store, what=f"the ranks to write into {store}")

    async def save(self, folder: Place) -> Mapping[str, FileEntry]:
        """Everything a resumed run needs of the learner, in a folder that all ranks' nodes reach.

        Returns:
            What the ranks put there, where it is a store.

        Raises:
            NotWritten: there is no room, or no permission; the learner can go on.
            LearnerDied: a rank's process is gone, or hangs.
        """
        return _together(await self._on_all_ranks("save", folder, what=f"the checkpoint {folder}"))

    async def load(self, folder: Place) -> None:
        """The inverse of `save`, before the first training step.

        Raises:
            CheckpointError: there is none, it cannot be read, or other ranks saved it.
            LearnerDied: a rank's process is gone, or hangs.
        """
        await self._keep_probe()
        await self._on_all_ranks("load", folder, what=f"loading the checkpoint {folder}")

    async def export(self, folder: Place) -> Mapping[str, FileEntry]:
        """The policy in Hugging Face format. Returns and raises as `save`."""
        return _together(await self._on_all_ranks("export", folder, what=f"the export {folder}"))

    async def stacks(self) -> dict[str, str]:
        """What each rank is doing, also while a verb runs; or why it does not say."""

        async def of(rank: int, actor: Any) -> str:
            try:
                return await wait(actor.stacks.remote(), _STACKS_SECONDS, what=f"what rank {rank} is doing")
            except (DeadlineExceeded, RayError) as error:
                return _one_line(error) + "\n"

        texts = await asyncio.gather(*(of(rank, actor) for rank, actor in enumerate(self._ranks)))
        return {f"learner rank {rank}": text for rank, text in enumerate(texts)}

    def shutdown(self) -> None:
        """End the ranks' processes and give their places back; harmless when they are gone."""
        self._end_ranks()
        self._release()

    def _release(self) -> None:
        if self._places is not None:
            self._places.release()
            self._places = None

    def _end_ranks(self) -> None:
        for actor in self._ranks:
            ray.kill(actor)
        self._ranks.clear()
        self._sent_to = self._probe = None

    def _new_ranks(self) -> list[Any]:
        assert self._places is not None
        options = [self._places.options(rank) for rank in range(self._config.learner.ranks)]
        return start_ranks(self._config, self._model_path, self._run_id, options, self._logs)

    async def _meet_in_place(self) -> None:
        """`_meet`, or the error of `Places.until_lost`."""
        assert self._places is not None
        meeting, losing = asyncio.create_task(self._meet()), asyncio.create_task(self._places.until_lost())
        try:
            done = await first_of({meeting, losing}, self._config.learner.start_timeout)
            await (losing if done == {losing} else meeting)
        finally:
            losing.cancel()
            meeting.cancel()

    async def _meet(self) -> None:
        seconds = self._config.learner.start_timeout
        address, port = await self._answer(0, "host", what="the learner's first rank to start", seconds=seconds)
        await self._on_all_ranks("start", address, port, what="the learner's ranks to start", seconds=seconds)

    async def _send(self, version: int, actors: list[Any]) -> None:
        """By NCCL, in a group that is formed anew whenever the actors are others."""
        what, port = f"version {version} to be sent by NCCL", None
        if actors != self._sent_to:
            self._sent_to = None
            port = await self._answer(0, "free_port", what="a free port on the learner's node", seconds=_STACKS_SECONDS)
        try:
            await self._on_all_ranks("send", version, actors, port, what=what)
        except (RunError, RayTaskError) as error:
            raise TransferBroke(f"the transfer by NCCL broke off, and its group with it: {_one_line(error)}") from error
        self._sent_to = actors

    async def _keep_probe(self) -> None:
        """Before the policy changes: engines that join later prove the version that was published last."""
        if self._probe is not None:
            await self._probe.ask()

    async def _on_all_ranks(self, verb: str, *args: object, what: str, seconds: float | None = None) -> list[Any]:
        """Results by rank. The first failure is raised without the others, which may be stuck waiting for the failed rank.

        Args:
            verb: of LearnerActor.
            args: of the verb.
            what: completes the sentence "waited 12 s for ...".
            seconds: that it may take; unset: `learner.step_timeout`.

        Raises:
            LearnerDied: a rank's process is gone, or it did not answer in time.
            RunError: the first that a rank raised.
            ray.exceptions.RayTaskError: another error of a rank.
        """
        if not self._ranks:
            raise LearnerDied("the learner has no processes: they were ended, or could not be started")
        seconds = self._config.learner.step_timeout if seconds is None else seconds
        answers = [
            asyncio.create_task(self._answer(rank, verb, *args, what=what, seconds=seconds))
            for rank in range(len(self._ranks))
        ]
        try:
            return await asyncio.gather(*answers)
        except RayTaskError as error:
            if death := await _death_behind(answers):
                raise death from error
            raise
        finally:
            for answer in answers:
                answer.cancel()

    async def _answer(self, rank: int, verb: str, *args: object, what: str, seconds: float) -> Any:
        try:
            call = getattr(self._ranks[rank], verb).remote(*args)
            return await wait(
                call, seconds, what=what, causes="learner.step_timeout is too short for it, or it is stuck"
            )
        except RayTaskError as error:  # first: Ray makes it an instance of its cause's class as well
            if isinstance(error.cause, RunError):
                raise error.cause from error
            raise
        except _DEATHS as error:
            raise LearnerDied(f"rank {rank} of the learner died: {_one_line(error)}") from error
        except DeadlineExceeded as error:
            raise LearnerDied(f"rank {rank} of the learner hangs: {error}") from error


class _KeptProbe:
    """The probe of one published version, asked of the ranks once, while they still have that version."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self._probe: Probe | None = None

    async def ask(self) -> Probe:
        """As `PublishedWeights.probe`."""
        if self._probe is None:
            self._probe = await self._learner.probe()
        return self._probe


async def _death_behind(answers: Sequence[asyncio.Task[Any]]) -> LearnerDied | None:
    """The death of a rank, if there was one: its peers fail with "connection closed", often before Ray tells of it."""
    deadline = Deadline(_DEATH_SECONDS, what="the other ranks")
    pending = set(answers)
    while pending:
        done = {answer for answer in pending if answer.done()} or await first_of(pending, deadline.left)
        if not done:
            return None
        for answer in done:
            if isinstance(death := answer.exception(), LearnerDied):
                return death
        pending -= done
    return None


def _together(files: Sequence[Mapping[str, FileEntry]]) -> dict[str, FileEntry]:
    """What the ranks put somewhere; each puts its own."""
    return {name: entry for found in files for name, entry in found.items()}


def _one_line(error: BaseException) -> str:
    """What an error says, without the details that Ray indents."""
    return " ".join(" ".join(line for line in str(error).splitlines() if not line.startswith("\t")).split())
