"""One prompt -> TrajectoryGroup: sample, score, segment, continue from the states in between, value them.

Knows neither Ray nor vLLM: it is handed an engine and a scorer, and its verbs are coroutines, so that many groups share
one engine without any barrier between them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from actors.sampling import PromptSampling, Sampler
from actors.scoring import Scorer
from actors.segmentation import segment
from actors.state_tree import ROOT, State
from actors.values import Valuation
from ray_rl.config import RunConfig
from ray_rl.config.values import NoValues
from ray_rl.errors import first_error
from ray_rl.tokenizer import TokenizerCodec
from ray_rl.types import (
    Completion,
    Continuation,
    GroupCost,
    GroupSummary,
    Prompt,
    Reward,
    ScoredSample,
    ScoringItem,
    Trajectory,
    TrajectoryGroup,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A scored completion whose states are not valued yet."""

    completion: Completion
    text: str
    boundaries: tuple[int, ...]
    reward: Reward


class Rollout:
    """Makes groups for training and answers for evaluation."""

    def __init__(self, config: RunConfig, engine: Sampler, scorer: Scorer, codec: TokenizerCodec) -> None:
        self._config = config
        self._engine = engine
        self._scorer = scorer
        self._codec = codec

    async def collect(self, prompt: Prompt) -> TrajectoryGroup:
        """Sample and score a group; when the advantage needs state values, continue from its states and value them."""
        started = time.monotonic()
        rollout, sampling = self._config.rollout, self._sampling(prompt)
        if isinstance(self._config.values, NoValues):
            completions = await sampling.sample((), rollout.group_size)
            rewards = await self._score(
                prompt, [(completion.token_ids, completion.finished) for completion in completions]
            )
            trajectories = [
                Trajectory(completion=c, text=self._text(c.token_ids), reward=r, boundaries=_whole(c), values=())
                for c, r in zip(completions, rewards, strict=True)
            ]
            return _group(prompt, trajectories, None, started=started, block=rollout.block_size)

        # States are numbered as completions come, and estimators go by the numbers: here in the same order each time.
        together = await sampling.sample((), rollout.group_size) if self._config.deterministic else ()

        async def sample(index: int) -> Completion:
            if together:
                return together[index]
            (completion,) = await sampling.sample((), 1)
            return completion

        async def grade(index: int, completion: Completion) -> Reward:
            (reward,) = await self._score(prompt, [(completion.token_ids, completion.finished)])
            return reward

        return await self._valued(sampling, rollout.group_size, sample, grade, started)

    async def values_of(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[Reward]
    ) -> TrajectoryGroup:
        """Value completions that are there already; as `collect` with state values, but for sampling and scoring them."""

        async def sample(index: int) -> Completion:
            return completions[index]

        async def grade(index: int, completion: Completion) -> Reward:
            return rewards[index]

        return await self._valued(self._sampling(prompt), len(completions), sample, grade, time.monotonic())

    async def continuations(self, prompt: Prompt, state: State, count: int) -> list[Continuation]:
        """Scored continuations of one state; they may use the tokens that its prefix has left."""
        return await self._continuations(self._sampling(prompt), state, count)

    async def _continuations(self, sampling: PromptSampling, state: State, count: int) -> list[Continuation]:
        completions = await sampling.sample(state.prefix, count)
        answers = [((*state.prefix, *c.token_ids), c.finished) for c in completions]
        rewards = await self._score(sampling.prompt, answers)
        return [
            Continuation(trajectory=state.trajectory, boundary=state.boundary, completion=completion, reward=reward)
            for completion, reward in zip(completions, rewards, strict=True)
        ]

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers without values; temperature 0 is greedy. What is unfinished has no final answer."""
        completions = await self._sampling(prompt).sample((), samples, temperature)
        rewards = await self._score(prompt, [(completion.token_ids, completion.finished) for completion in completions])
        finished = [self._text(completion.token_ids) for completion in completions if completion.finished]
        answers = iter(await self._scorer.final_answers(finished) if finished else [])
        return tuple(
            ScoredSample(
                reward=reward,
                answer=next(answers) if completion.finished else "",
                tokens=len(completion.token_ids),
                finished=completion.finished,
            )
            for completion, reward in zip(completions, rewards, strict=True)
        )

    async def _valued(
        self,
        sampling: PromptSampling,
        count: int,
        sample: Callable[[int], Awaitable[Completion]],
        grade: Callable[[int, Completion], Awaitable[Reward]],
        started: float,
    ) -> TrajectoryGroup:
        """A group of `count` completions with the values of their states.

        Where the estimator waits for no outcome, a state is continued as soon as its completion is there, the prompt's
        state at once. What is planned later waits for the results of the round before, of this group alone.
        """
        assert not isinstance(self._config.values, NoValues)
        valuation = Valuation(self._config.values, count)
        drafts: list[_Draft | None] = [None] * count

        async def enter(index: int, tasks: asyncio.TaskGroup) -> None:
            completion = await sample(index)
            text, starts = self._codec.decode_with_offsets(completion.token_ids)
            cuts = segment(self._config.segmentation, text, starts, completion.behavior_logprobs)
            for state in valuation.tree.add(index, completion.token_ids, completion.behavior_logprobs, cuts):
                self._start(tasks, sampling, valuation, state, valuation.at_once)
            reward = await grade(index, completion)
            drafts[index] = _Draft(completion=completion, text=text, boundaries=cuts, reward=reward)

        async with _plain_errors(), asyncio.TaskGroup() as tasks:
            self._start(tasks, sampling, valuation, ROOT, valuation.at_once)
            for index in range(count):
                tasks.create_task(enter(index, tasks))
        done = [draft for draft in drafts if draft is not None]
        for index, draft in enumerate(done):
            valuation.add_reward(index, draft.reward)
        while asked := valuation.plan():
            async with _plain_errors(), asyncio.TaskGroup() as tasks:
                for state, count in asked.items():
                    self._start(tasks, sampling, valuation, state, count)
        trajectories = [
            Trajectory(
                completion=draft.completion,
                text=draft.text,
                reward=draft.reward,
                boundaries=draft.boundaries,
                values=valuation.values(index, draft.boundaries, draft.reward),
            )
            for index, draft in enumerate(done)
        ]
        return _group(sampling.prompt, trajectories, valuation, started=started, block=self._config.rollout.block_size)

    def _start(
        self, tasks: asyncio.TaskGroup, sampling: PromptSampling, valuation: Valuation, state: int, count: int
    ) -> None:
        if count:
            tasks.create_task(self._continue_from(sampling, valuation, state, count))

    async def _continue_from(self, sampling: PromptSampling, valuation: Valuation, index: int, count: int) -> None:
        for continuation in await self._continuations(sampling, valuation.tree.states[index], count):
            valuation.add(index, continuation)

    def _sampling(self, prompt: Prompt) -> PromptSampling:
        return PromptSampling(self._config, self._engine, prompt)

    async def _score(self, prompt: Prompt, answers: Sequence[tuple[Sequence[int], bool]]) -> list[Reward]:
        """Rewards of (token ids, finished); the unfinished are not graded."""
        unfinished = Reward(value=self._config.reward.unfinished, parts={"unfinished": 1.0})
        finished = [tokens for tokens, ended in answers if ended]
        items = [ScoringItem(problem=prompt.problem, completion_text=self._text(tokens)) for tokens in finished]
        graded = iter(await self._scorer.score(items) if items else [])
        return [next(graded) if ended else unfinished for _, ended in answers]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._codec.decode_with_offsets(token_ids)[0]


def _whole(completion: Completion) -> tuple[int, ...]:
    """The completion as one segment."""
    return (0, len(completion.token_ids)) if completion.token_ids else (0,)


@asynccontextmanager
async def _plain_errors() -> AsyncIterator[None]:
    """What a group of tasks fails with, as the first error itself: callers tell engines' and graders' deaths by type."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


def _group(
    prompt: Prompt, trajectories: Sequence[Trajectory], valuation: Valuation | None, *, started: float, block: int
) -> TrajectoryGroup:
    """The record of a group; `block` is the number of tokens of a block of the engine's cache."""
    continuations = valuation.continuations() if valuation else ()
    cost = GroupCost(
        primary_tokens=sum(len(trajectory.completion.token_ids) for trajectory in trajectories),
        prompt_tokens=len(prompt.token_ids) * len(trajectories),
        cached_prompt_tokens=sum(trajectory.completion.cached_tokens for trajectory in trajectories),
        continuations=len(continuations),
        continuation_tokens=sum(len(continuation.completion.token_ids) for continuation in continuations),
        states=len(valuation.tree.states) if valuation else 0,
        closed_states=valuation.closed_states() if valuation else 0,
        rounds=valuation.rounds if valuation else 0,
        prefix_tokens=sum(len(prompt.token_ids) + continuation.boundary for continuation in continuations),
        cacheable_prefix_tokens=sum((len(prompt.token_ids) + c.boundary - 1) // block * block for c in continuations),
        cached_prefix_tokens=sum(continuation.completion.cached_tokens for continuation in continuations),
        seconds=time.monotonic() - started,
    )
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), continuations=continuations, cost=cost)


def summarize(group: TrajectoryGroup) -> GroupSummary:
    """What the driver may know of a group."""
    trajectories = group.trajectories
    sampled: list[Trajectory | Continuation] = [*trajectories, *group.continuations]
    versions = [span.version for sample in sampled for span in sample.completion.versions]
    values = [value for trajectory in trajectories for value in trajectory.values if value.count]
    errors = [value.stderr for value in values if math.isfinite(value.stderr) and not value.closed]
    gradings = [sample for sample in sampled if sample.completion.finished]
    return GroupSummary(
        prompt_id=group.prompt.prompt_id,
        position=group.prompt.position,
        oldest_version=min(versions),
        newest_version=max(versions),
        rewards=tuple(trajectory.reward.value for trajectory in trajectories),
        lengths=tuple(len(trajectory.completion.token_ids) for trajectory in trajectories),
        truncated=sum(not trajectory.completion.finished for trajectory in trajectories),
        failures=sum(graded.reward.failure is not None for graded in gradings),
        graded=len(gradings),
        segments=sum(len(trajectory.boundaries) - 1 for trajectory in trajectories),
        value_mean=math.fsum(value.mean for value in values) / len(values) if values else math.nan,
        value_stderr=math.fsum(errors) / len(errors) if errors else math.nan,
        cost=group.cost,
    )
