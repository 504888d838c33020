"""Where a completion is cut into segments. Every rule looks at the prefix only, so that values stay unbiased."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_rl.config.section import Section


class TextSegmentation(Section):
    """What the rules that look at the text share."""

    min_tokens: int = Field(1, ge=1)
    """A cut that comes fewer tokens after the last kept one is dropped (the short piece merges forwards)."""
    max_tokens: int | None = Field(None, ge=1)
    """Longer segments are cut again every so many tokens."""
    max_segments: int | None = Field(None, ge=1)
    """After so many segments no more cuts are made."""

    @model_validator(mode="after")
    def _room(self) -> "TextSegmentation":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}: lower the first")
        return self


class LinesSegmentation(TextSegmentation):
    """At line breaks outside formulas."""

    kind: Literal["lines"] = "lines"


class SentencesSegmentation(TextSegmentation):
    """At line breaks and sentence ends outside formulas."""

    kind: Literal["sentences"] = "sentences"


class ClausesSegmentation(TextSegmentation):
    """At line breaks, sentence ends and commas outside formulas."""

    kind: Literal["clauses"] = "clauses"


class FixedSegmentation(Section):
    """Every so many tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(32, ge=1)
    """Tokens per segment."""
    max_segments: int | None = Field(None, ge=1)


SegmentationConfig = Annotated[
    LinesSegmentation | SentencesSegmentation | ClausesSegmentation | FixedSegmentation, Field(discriminator="kind")
]
