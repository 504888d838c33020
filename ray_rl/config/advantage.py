"""How rewards become advantages (formulas and sources: learner/advantages.py)."""

from typing import Annotated, Literal

from pydantic import Field

from ray_rl.config.section import Section


class AdvantageSection(Section):
    """What every advantage shares."""

    whiten: Literal["none", "batch", "minibatch"] = "none"
    """Shift and scale the advantages to mean 0 and variance 1 over the loss tokens of the batch, or of each minibatch."""


class GrpoAdvantage(AdvantageSection):
    """(r - mean) / (std + 1e-6) over the group (arXiv 2402.03300)."""

    kind: Literal["grpo"] = "grpo"


class DrGrpoAdvantage(AdvantageSection):
    """r - mean over the group (arXiv 2503.20783)."""

    kind: Literal["dr_grpo"] = "dr_grpo"


class RlooAdvantage(AdvantageSection):
    """r - mean of the others in the group (arXiv 2402.14740)."""

    kind: Literal["rloo"] = "rloo"


class VineppoAdvantage(AdvantageSection):
    """The change of the expected reward over each segment (arXiv 2410.01679); needs `values`."""

    kind: Literal["vineppo"] = "vineppo"
    gae_lambda: float = Field(0.0, ge=0, le=1)
    """Share of later states' values, and at last of the completion's own reward, in what a segment is taken to lead to
    (GAE, arXiv 1506.02438, section 3, with gamma = 1). 0: the next state's value alone, the published method."""
    baseline_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of earlier states' values in what a segment is taken to start from. 0: the state's own value alone, the
    published method. Neither share biases the gradient; they trade the noise of estimated values for that of rewards."""


AdvantageConfig = Annotated[
    GrpoAdvantage | DrGrpoAdvantage | RlooAdvantage | VineppoAdvantage, Field(discriminator="kind")
]
