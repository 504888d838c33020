"""How the values of the states between segments are estimated."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_rl.config.section import Section

Pooling = Literal["none", "passing", "backup"]


class SampledValues(Section):
    """What every estimate from continuations shares."""

    pooling: Pooling = "none"
    """What counts for a state's value besides the continuations that start there. `passing`: what passes through it, the
    group's other completions and continuations from earlier states, each once. `backup`: that, and where a segment
    leads to a state whose value is known, the policy's own probability of the segment instead of chance
    (`actors/backup.py`). Both unbiased; a completion's own reward is no sample for the values of its own states."""
    train_on_continuations: bool = False
    """Continuations enter the batch too, with the advantage r - V(s) on their own tokens; a prompt's weight stays."""


class FixedValues(SampledValues):
    """K fresh continuations from every distinct state: the published method (arXiv 2410.01679). Unbiased."""

    kind: Literal["fixed"] = "fixed"
    num_continuations: int = Field(3, ge=1)
    """K, continuations per distinct state."""


class AdaptiveValues(SampledValues):
    """Continuations where they tell most: none where the outcome is decided, elsewhere so many to each state as its share in
    the error of the advantages asks for. `actors/adaptive.py` tells the rules."""

    kind: Literal["adaptive"] = "adaptive"
    pooling: Pooling = "backup"
    num_continuations: int = Field(3, ge=1)
    """K, samples that a state of one completion gets halfway if all is open there, those that are pooled included. Others
    get more or fewer, as far as an error of theirs weighs more or less (`actors/adaptive.py`), at most 3 K."""
    closing: Literal["groups", "states"] = "groups"
    """What may be taken for decided. `groups`: all states of a group whose rewards are all the smallest or all the largest
    there can be. `states`: each completion is searched by bisection for the state from which on its reward is certain,
    which takes several rounds; for policies whose outcome is mostly decided early."""
    max_bias: float = Field(0.15, ge=0, lt=1)
    """A state counts as decided when n samples agree with the completion's own reward; n is the smallest number for which
    the expected error that false agreement can cause, whatever the policy, is at most this. 0: never decided, unbiased."""
    token_budget: float = Field(2.0, gt=0)
    """Most continuation tokens of a group, as expected when they are asked for, per token of its completions."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest reward there can be: only from there a value cannot move any more."""

    @property
    def certain(self) -> float:
        """Probability of leaving a completion up to which a state needs no sample of its own (`actors/backup.py`)."""
        return min(self.max_bias, 0.02)

    @model_validator(mode="after")
    def _ordered(self) -> "AdaptiveValues":
        if self.reward_range[0] >= self.reward_range[1]:
            raise ValueError(f"reward_range: {list(self.reward_range)}; the smaller one comes first")
        return self


class NoValues(Section):
    """No continuations: for advantages that compare whole completions only."""

    kind: Literal["none"] = "none"


ValuesConfig = Annotated[FixedValues | AdaptiveValues | NoValues, Field(discriminator="kind")]
