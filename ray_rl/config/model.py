"""Which policy is trained, and in which number format."""

from typing import Literal

from pydantic import Field

from ray_rl.config.section import Section

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The policy: any causal language model in Hugging Face format."""

    path: str = Field("embedded", min_length=1)
    """Hugging Face name, a local folder, or `embedded`: the tiny policy that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless asked for: it is somebody else's program."""
    dtype: Dtype = "float32"
    """Of the weights in the engines, and of the learner's computation (its master weights stay float32)."""
    chat_template: bool | None = None
    """Wrap prompts in the tokenizer's chat template. Unset: when the tokenizer has one."""
    system_prompt: str | None = None
    """Put before every prompt as a system message; needs a chat template."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The learner's attention implementation (a transformers name)."""
    max_model_len: int = Field(256, ge=8)
    """Longest prompt plus completion, in tokens. Longer prompts are an error, never cut."""
