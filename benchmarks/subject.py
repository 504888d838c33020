"""A fixed policy behind an engine, whose groups any estimator may value: what `values` and `gradient` look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from actors.reward_actor import make_scorer
from actors.rollout import Rollout, Sampler
from actors.state_tree import State
from ray_rl.config import RunConfig
from ray_rl.config.values import AdaptiveValues, FixedValues
from ray_rl.prompt_stream import PromptStream
from ray_rl.tokenizer import TokenizerCodec
from ray_rl.types import Prompt, TrajectoryGroup

_SAMPLES_ONLY = FixedValues(num_continuations=1)
"""One continuation a state is the cheapest way to the segments that every estimator will see."""


class Subject:
    """A recipe's policy, prompts, segmentation and reward; estimators come and go."""

    def __init__(self, config: RunConfig, engine: Sampler, codec: TokenizerCodec, stream: PromptStream) -> None:
        """Use `subject_of`."""
        self.config = config
        self.engine = engine
        self._codec = codec
        self._stream = stream
        self._scorer = make_scorer(config.reward, [])

    def next_prompt(self) -> Prompt:
        """Of the recipe's stream."""
        return self._stream.next()

    async def group(self, prompt: Prompt) -> TrajectoryGroup:
        """Fresh completions, cut into segments and graded."""
        return await self._rollout(_SAMPLES_ONLY, self.engine).collect(prompt)

    async def valued(
        self, group: TrajectoryGroup, values: FixedValues | AdaptiveValues, sampler: Sampler | None = None
    ) -> TrajectoryGroup:
        """The same completions as an estimator values them, with continuations of the engine or of another sampler."""
        rollout = self._rollout(values, sampler or self.engine)
        completions = [trajectory.completion for trajectory in group.trajectories]
        rewards = [trajectory.reward for trajectory in group.trajectories]
        return await rollout.values_of(group.prompt, completions, rewards)

    async def continuations(self, prompt: Prompt, state: State, count: int) -> list[tuple[Sequence[int], float]]:
        """Tokens and reward of fresh continuations of a state."""
        drawn = await self._rollout(_SAMPLES_ONLY, self.engine).continuations(prompt, state, count)
        return [(continuation.completion.token_ids, continuation.reward.value) for continuation in drawn]

    def _rollout(self, values: FixedValues | AdaptiveValues, sampler: Sampler) -> Rollout:
        config = self.config.model_copy(update={"values": values})
        return Rollout(config, sampler, self._scorer, self._codec)


@asynccontextmanager
async def subject_of(config: RunConfig, *, seed: int) -> AsyncIterator[Subject]:
    """Start an engine with a recipe's policy; it ends with the context.

    Args:
        config: with an estimator of its own, which is replaced by those that are compared.
        seed: of the engine's sampling.
    """
    from actors.engine import Engine
    from ray_rl.launch import Prepared, model_source

    prepared = Prepared(config)
    stop = prepared.codec.eos_token_ids()
    engine = await Engine.start(config, model_source(config), eos_token_ids=stop, seed=seed)
    try:
        yield Subject(config, engine, prepared.codec, prepared.stream)
    finally:
        engine.shutdown()
