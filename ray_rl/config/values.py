"""How the values of the states between segments are estimated."""

from typing import Annotated, Literal

from pydantic import Field

from ray_rl.config.section import Section


class FixedValues(Section):
    """K fresh continuations from every distinct state: the published method (arXiv 2410.01679)."""

    kind: Literal["fixed"] = "fixed"
    num_continuations: int = Field(3, ge=1)
    """K, continuations per distinct state."""


class NoValues(Section):
    """No continuations: for advantages that compare whole completions only."""

    kind: Literal["none"] = "none"


ValuesConfig = Annotated[FixedValues | NoValues, Field(discriminator="kind")]
