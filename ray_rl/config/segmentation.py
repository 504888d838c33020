"""Where a completion is cut into segments. Every rule looks at the prefix only, so that values stay unbiased."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_rl.config.section import Section


class LimitedSegmentation(Section):
    """What the rules that find cuts of uneven distance share: how short, how long and how many segments may be."""

    min_tokens: int = Field(1, ge=1)
    """A cut that comes fewer tokens after the last kept one is dropped (the short piece merges forwards)."""
    max_tokens: int | None = Field(None, ge=1)
    """Longer segments are cut again every so many tokens."""
    max_segments: int | None = Field(None, ge=1)
    """After so many segments no more cuts are made; the last one may then exceed max_tokens."""

    @model_validator(mode="after")
    def _room(self) -> "LimitedSegmentation":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}: lower the first")
        return self


class LinesSegmentation(LimitedSegmentation):
    """At line breaks outside formulas."""

    kind: Literal["lines"] = "lines"


class SentencesSegmentation(LimitedSegmentation):
    """At line breaks and sentence ends outside formulas."""

    kind: Literal["sentences"] = "sentences"


class ClausesSegmentation(LimitedSegmentation):
    """At line breaks, sentence ends and commas outside formulas."""

    kind: Literal["clauses"] = "clauses"


class CutpointsSegmentation(LimitedSegmentation):
    """After every so many tokens that the policy was uncertain of, whatever the text (SPO-chain, arXiv 2505.23564).

    Uncertain tokens are counted over the whole completion: neither a cut dropped for min_tokens nor one added for
    max_tokens starts the count anew.
    """

    kind: Literal["cutpoints"] = "cutpoints"
    every: int = Field(5, ge=1)
    """Uncertain tokens per segment; the segment ends directly after the last of them."""
    threshold: float = Field(0.9, gt=0, le=1)
    """A token sampled with a probability below this one (at the sampling temperature) is uncertain."""


class FixedSegmentation(Section):
    """Every so many tokens, whatever the text.

    `tokens` is the shortest and the longest length in one. Only the last segment may be shorter: to merge a short rest
    into the segment before it, the end of the completion would have to decide whether an earlier state is valued.
    """

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(32, ge=1)
    """Tokens per segment."""
    max_segments: int | None = Field(None, ge=1)
    """After so many segments no more cuts are made; the last one may then be longer."""


SegmentationConfig = Annotated[
    LinesSegmentation | SentencesSegmentation | ClausesSegmentation | CutpointsSegmentation | FixedSegmentation,
    Field(discriminator="kind"),
]
