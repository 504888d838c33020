"""One prompt -> TrajectoryGroup: sample, score, segment, continue from the states in between, value them.

Knows neither Ray nor vLLM: it is handed an engine and a scorer, and its verbs are coroutines, so that many groups share
one engine without any barrier between them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Protocol

from actors.scoring import Scorer
from actors.segmentation import segment
from actors.values import State, continuation_counts, distinct_states, state_value
from ray_rl.config import RunConfig
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


class Sampler(Protocol):
    """What a rollout needs of an engine."""

    async def generate(
        self, token_ids: Sequence[int], *, n: int, max_tokens: int, temperature: float | None = None
    ) -> tuple[Completion, ...]:
        """n completions of a prefix; temperature None is the configured one, 0 is greedy."""


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
        rollout = self._config.rollout
        completions = await self._engine.generate(prompt.token_ids, n=rollout.group_size, max_tokens=rollout.max_tokens)
        rewards = await self._score(prompt, [(completion.token_ids, completion.finished) for completion in completions])
        decoded = [self._codec.decode_with_offsets(completion.token_ids) for completion in completions]
        if self._config.values.kind == "none":
            trajectories = [
                Trajectory(completion=c, text=text, reward=r, boundaries=_whole(c), values=())
                for c, r, (text, _) in zip(completions, rewards, decoded, strict=True)
            ]
            return _group(prompt, trajectories, [], states=0, started=started)
        cuts = [segment(self._config.segmentation, text, starts) for text, starts in decoded]
        states, starts = distinct_states([c.token_ids for c in completions], cuts)
        continued = await self._continue(prompt, states)
        trajectories = [
            Trajectory(
                completion=completion,
                text=text,
                reward=reward,
                boundaries=own_cuts,
                values=tuple(
                    state_value(boundary, [continuation.reward for continuation in continued[state]])
                    for boundary, state in zip(own_cuts[:-1], own_states, strict=True)
                ),
            )
            for completion, reward, (text, _), own_cuts, own_states in zip(
                completions, rewards, decoded, cuts, starts, strict=True
            )
        ]
        flat = [continuation for of_state in continued for continuation in of_state]
        return _group(prompt, trajectories, flat, states=len(states), started=started)

    async def evaluate(self, prompt: Prompt, *, samples: int, temperature: float) -> tuple[ScoredSample, ...]:
        """Scored answers without values; temperature 0 is greedy. What is unfinished has no final answer."""
        completions = await self._engine.generate(
            prompt.token_ids, n=samples, max_tokens=self._config.rollout.max_tokens, temperature=temperature
        )
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

    async def _continue(self, prompt: Prompt, states: Sequence[State]) -> list[list[Continuation]]:
        """Scored continuations of each state, as many as the configured estimator asks for."""
        counts = continuation_counts(self._config.values, states)
        return await asyncio.gather(
            *(self._continue_from(prompt, state, count) for state, count in zip(states, counts, strict=True))
        )

    async def _continue_from(self, prompt: Prompt, state: State, count: int) -> list[Continuation]:
        """Continuations of one state; they may use the tokens that its prefix has left."""
        completions = await self._engine.generate(
            (*prompt.token_ids, *state.prefix), n=count, max_tokens=self._config.rollout.max_tokens - state.boundary
        )
        rewards = await self._score(prompt, [((*state.prefix, *c.token_ids), c.finished) for c in completions])
        return [
            Continuation(trajectory=state.trajectory, boundary=state.boundary, completion=completion, reward=reward)
            for completion, reward in zip(completions, rewards, strict=True)
        ]

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


def _group(
    prompt: Prompt,
    trajectories: Sequence[Trajectory],
    continuations: Sequence[Continuation],
    *,
    states: int,
    started: float,
) -> TrajectoryGroup:
    cost = GroupCost(
        primary_tokens=sum(len(trajectory.completion.token_ids) for trajectory in trajectories),
        continuations=len(continuations),
        continuation_tokens=sum(len(continuation.completion.token_ids) for continuation in continuations),
        states=states,
        prefix_tokens=sum(len(prompt.token_ids) + continuation.boundary for continuation in continuations),
        cached_prefix_tokens=sum(continuation.completion.cached_tokens for continuation in continuations),
        seconds=time.monotonic() - started,
    )
    return TrajectoryGroup(
        prompt=prompt, trajectories=tuple(trajectories), continuations=tuple(continuations), cost=cost
    )


def summarize(group: TrajectoryGroup) -> GroupSummary:
    """What the driver may know of a group."""
    trajectories = group.trajectories
    sampled: list[Trajectory | Continuation] = [*trajectories, *group.continuations]
    versions = [span.version for sample in sampled for span in sample.completion.versions]
    values = [value for trajectory in trajectories for value in trajectory.values if value.count]
    errors = [value.stderr for value in values if math.isfinite(value.stderr)]
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
