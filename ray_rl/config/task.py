"""Where the problems come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_rl.config.section import Section

MOST_PROBLEMS = 10_000_000
"""Of an epoch, whose order is kept in memory."""
MOST_HELD_OUT = 100_000
"""They are all made before a run begins."""


class ArithmeticTaskConfig(Section):
    """The built-in task: chains of additions, subtractions and multiplications modulo 10."""

    kind: Literal["arithmetic"] = "arithmetic"
    min_steps: int = Field(4, ge=1, le=20)
    """Shortest chain, in operations."""
    max_steps: int = Field(7, ge=1, le=20)
    """Longest chain, in operations. Difficulty grows with it: every step must be right."""
    train_size: int = Field(100_000, ge=1, le=MOST_PROBLEMS)
    """Training problems; they are generated when asked for."""
    eval_size: int = Field(512, ge=1, le=MOST_HELD_OUT)
    """Held-out problems; none of them can occur in training, whatever the seeds."""
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> "ArithmeticTaskConfig":
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds max_steps {self.max_steps}: swap them")
        return self


class ReasoningGymTaskConfig(Section):
    """A generator of the reasoning-gym package, verified by its own scorer."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str = "chain_sum"
    """Its name in reasoning-gym."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to `reasoning_gym.create_dataset`, for instance `{min_terms: 2, max_digits: 1}`."""
    train_size: int = Field(10_000, ge=1, le=MOST_PROBLEMS)
    eval_size: int = Field(256, ge=1, le=MOST_HELD_OUT)
    seed: int = 0
    """Training problems use this seed. Held-out ones use another, and any that occurs in training is left out."""
    prompt_prefix: str = ""
    """Put before every question, for instance worked examples."""
    prompt_suffix: str = ""
    """Appended to every question, for instance how to mark the answer."""


class DatasetTaskConfig(Section):
    """Rows of JSONL or parquet files, of a folder of them, or of a Hugging Face dataset."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(min_length=1)
    """A .jsonl, .json or .parquet file, a folder, or the name of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    train_split: str = "train"
    eval_split: str = "test"
    """Ignored for a single file when `eval_path` is given."""
    eval_path: str | None = Field(None, min_length=1)
    """File or folder with the held-out rows. Unset: `eval_split` of `path`."""
    prompt_column: str = Field("prompt", min_length=1)
    """Dotted path to the prompt (text or messages) within a row."""
    answer_column: str | None = Field("answer", min_length=1)
    """Dotted path to the reference answer within a row, for instance `reward_model.ground_truth`. null: the verifier
    needs none, or reads it from the remaining columns."""
    answer_marker: str | None = Field(None, min_length=1)
    """Keep of the reference answer only what follows the last occurrence of this marker (GSM8K: `####`)."""
    prompt_prefix: str = ""
    """Put before every text prompt, or before the text of the last message."""
    prompt_suffix: str = ""
    """Appended to every text prompt, or to the text of the last message."""
    train_limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
    eval_limit: int | None = Field(None, ge=1)


TaskConfig = Annotated[ArithmeticTaskConfig | ReasoningGymTaskConfig | DatasetTaskConfig, Field(discriminator="kind")]
