"""The shared language: what travels between prompts, rollouts, rewards and the learner.

Every record is frozen, slotted and keyword-only; a stage that knows more makes a new record instead of filling one in.

    Problem -> Prompt -> Completion -> Trajectory -> TrajectoryGroup -> TrainingSample -> Microbatch -> StepStats

Shapes: T = tokens of a completion, L = tokens of prompt and completion together, G = group size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of a task, before any tokenizer has seen it.

    Example: ``Problem(problem_id="arithmetic:train:17", prompt="3+4*7:\\n", answer="9", metadata={"steps": 2})``
    """

    problem_id: str
    """Unique within its task and split."""
    prompt: str | Sequence[Mapping[str, str]]
    """Plain text, or chat messages with the keys ``role`` and ``content``."""
    answer: str
    """What the verifier compares with; empty where the verifier needs none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The remaining columns of the row, handed to the verifier untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as the policy sees it."""

    problem: Problem
    position: int
    """Index in the run's prompt stream (grows for ever; the epoch is position // size). -1 for evaluation."""
    token_ids: tuple[int, ...]
    """The encoded prompt, chat template applied."""

    @property
    def prompt_id(self) -> str:
        """Unique within a run: the stream position and the problem."""
        return f"{self.position}:{self.problem.problem_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Which policy version sampled the completion tokens [start, end)."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Tokens that an engine sampled after a prefix; never re-tokenised."""

    token_ids: tuple[int, ...]
    """[T], including the end-of-sequence token where one was sampled."""
    behavior_logprobs: tuple[float, ...]
    """[T], natural log, of the policy that sampled, at the sampling temperature."""
    versions: tuple[VersionSpan, ...]
    """Adjoining spans that cover [0, T)."""
    finish_reason: FinishReason
    """``stop``: the policy ended it. ``length``: it ran out of tokens (truncated)."""
    cached_tokens: int = 0
    """Tokens of the prefix that the engine found in its prefix cache."""

    @property
    def finished(self) -> bool:
        """Whether the policy itself ended the completion."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringItem:
    """What a verifier is asked about: one finished completion of one problem."""

    problem: Problem
    completion_text: str
    """Decoded completion without special tokens; for a continuation, the prefix's text is included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The verdict on one completion.

    Example: ``Reward(value=1.0, parts={"exact": 1.0})``; a grader that timed out:
    ``Reward(value=0.0, failure="timeout after 5.0 s")``.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named components, for the record; their meaning is the verifier's."""
    failure: str | None = None
    """Why grading failed. The value is then the configured failure reward and does not count in state values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A fresh sample from the state after `boundary` tokens of trajectory `trajectory` of its group."""

    trajectory: int
    """Index in the group of the first trajectory that passes through the state."""
    boundary: int
    """Tokens of that trajectory's completion that precede the continuation."""
    completion: Completion
    reward: Reward
    baseline: float = math.nan
    """Value of the state it starts from, estimated without it; nan where nothing else speaks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateValue:
    """Monte-Carlo estimate of the expected reward from a state."""

    boundary: int
    """Token offset of the state in its trajectory's completion (0 = the prompt)."""
    mean: float
    stderr: float
    """Standard error of the mean (sample form); infinite with fewer than two samples."""
    count: int
    """Rewards averaged; failed graders don't count."""
    closed: bool = False
    """Whether it was not averaged but taken from the completion's own reward, since an earlier state (or this one) showed
    that the outcome was certain by then; `count` then tells how many rewards showed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A scored completion, cut into segments."""

    completion: Completion
    text: str
    reward: Reward
    boundaries: tuple[int, ...]
    """0 = b_0 < b_1 < ... < b_n = T, token offsets; n segments."""
    values: tuple[StateValue, ...]
    """[n] one per segment, of the state at which it starts; empty when the advantage needs none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """What a group cost to make."""

    primary_tokens: int
    prompt_tokens: int
    """Of the prompt, each completion's counted."""
    cached_prompt_tokens: int
    """Of those, found in the prefix cache."""
    continuations: int
    continuation_tokens: int
    states: int
    """Distinct states between the group's segments."""
    closed_states: int
    """Of those, such as no completion needed a sampled value of: the outcome was certain by then."""
    rounds: int
    """Times that continuations were asked for, each after the results of the one before."""
    prefix_tokens: int
    """Tokens of the prefixes that the continuations started from, each continuation's counted."""
    cacheable_prefix_tokens: int
    """Of those, all that a cache can have: the whole blocks before the last token, which is always computed."""
    cached_prefix_tokens: int
    """Of the prefix tokens, found in the prefix cache."""
    seconds: float


NO_COST = GroupCost(
    primary_tokens=0,
    prompt_tokens=0,
    cached_prompt_tokens=0,
    continuations=0,
    continuation_tokens=0,
    states=0,
    closed_states=0,
    rounds=0,
    prefix_tokens=0,
    cacheable_prefix_tokens=0,
    cached_prefix_tokens=0,
    seconds=0.0,
)
"""Of a group that nothing was spent on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """Everything one prompt became in the rollout actor."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    """[G]"""
    continuations: tuple[Continuation, ...]
    cost: GroupCost


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the driver knows of a group; it never holds tokens."""

    prompt_id: str
    position: int
    oldest_version: int
    newest_version: int
    rewards: tuple[float, ...]
    """[G]"""
    lengths: tuple[int, ...]
    """[G] tokens per completion."""
    truncated: int
    failures: int
    """Failed gradings, of completions and continuations."""
    graded: int
    """Gradings asked for, of completions and continuations."""
    segments: int
    value_mean: float
    """Mean state value; nan without values."""
    value_stderr: float
    """Mean finite standard error of the state values that were sampled; nan without any."""
    cost: GroupCost

    @property
    def decided(self) -> bool:
        """Whether all rewards are equal, so that group-relative advantages vanish."""
        return max(self.rewards) == min(self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """One evaluation answer."""

    reward: Reward
    answer: str
    """The final answer as the verifier of majority votes sees it; empty when there is none."""
    tokens: int
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """One sequence of the learner's batch. All tuples have length L; position t is token t of prompt + completion."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token was sampled by the policy and trains it."""
    behavior_logprobs: tuple[float, ...]
    """Zero where loss_mask is False."""
    advantages: tuple[float, ...]
    """Zero where loss_mask is False."""
    weights: tuple[float, ...]
    """Share with which each token enters the loss; zero where loss_mask is False."""
    confident_tokens: int = 0
    """Sampled tokens that left loss_mask because the policy had hardly a choice (`learner.loss.confident_above`)."""
    is_continuation: bool = False
    """Whether only a continuation's own tokens may train; the batch is measured in the other samples, completions."""

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that enter the loss."""
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Samples of one forward pass on one rank: indices into the minibatch's list of samples.

    Every rank runs the same number of microbatches, which ZeRO-3's collectives need; some may be empty.
    """

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one training step did: metric name -> value, already reduced over ranks, minibatches and epochs."""

    metrics: Mapping[str, float]
