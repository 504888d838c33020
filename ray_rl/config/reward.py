"""How completions are scored."""

from typing import Annotated, Literal

from pydantic import Field

from ray_rl.config.section import Section


class RewardSection(Section):
    """What every reward shares."""

    unfinished: float = 0.0
    """Reward of a truncated completion; it is not graded."""
    failure: float = 0.0
    """Reward of a completion whose grader failed or timed out. It is counted, logged and left out of state values."""
    max_failure_share: float = Field(0.2, ge=0, le=1)
    """The run stops when more than this share of a step's gradings fail."""
    timeout: float = Field(10.0, gt=0)
    """Seconds one grading may take before its process is killed. `exact` runs in place and needs none."""
    memory_gib: float = Field(4.0, gt=0)
    """Address space of one grader process, in GiB; a grading that wants more fails. `exact` runs in place without a limit."""


class ExactRewardConfig(RewardSection):
    """1 when the final answer equals the reference answer, else 0. Numbers compare without thousands separators."""

    kind: Literal["exact"] = "exact"
    marker: str = Field("#", min_length=1)
    """The final answer is what follows the last occurrence of this marker on its line (GSM8K: `####`)."""


class MathRewardConfig(RewardSection):
    """1 when math-verify finds the answers mathematically equal, else 0."""

    kind: Literal["math"] = "math"
    processes: int = Field(1, ge=1)
    """Grader processes per reward actor."""


class ReasoningGymRewardConfig(RewardSection):
    """The score, in [0, 1], of the reasoning-gym generator that made the problem."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    processes: int = Field(1, ge=1)
    answer_tag: str | None = "answer"
    """Score the content of the last <tag>..</tag>; unset, or without the tag: the whole completion, stripped."""


class PythonRewardConfig(RewardSection):
    """A function of yours: `def score(prompt, completion, answer, metadata) -> float | dict[str, float]`.

    A dict's key `reward` is the reward (without it: the sum of all values); the rest are recorded parts.
    """

    kind: Literal["python"] = "python"
    function: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """`path/to/file.py:function_name`."""
    processes: int = Field(1, ge=1)


RewardConfig = Annotated[
    ExactRewardConfig | MathRewardConfig | ReasoningGymRewardConfig | PythonRewardConfig, Field(discriminator="kind")
]
