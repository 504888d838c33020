"""What every configuration section shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; unknown keys are errors; every field carries its documentation as a docstring below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
