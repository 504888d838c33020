"""The learner: losses, optimizer, DeepSpeed."""

from typing import Any, Literal

from pydantic import Field

from ray_rl.config.section import Section


class LossConfig(Section):
    """PPO's clipped surrogate, summed over tokens and divided by global counts."""

    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high ("clip-higher" when larger than clip_low)."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"
    """`sequence_mean`: mean over each sequence's tokens, then over sequences (GRPO). `token_mean`: over all tokens of the
    minibatch (DAPO). `constant`: sum over tokens, divided by sequences times rollout.max_tokens (Dr. GRPO)."""
    confident_above: float | None = Field(None, gt=0, le=1)
    """Tokens that the policy sampled with at least this probability do not train, and no mean counts them (SPO, arXiv
    2505.23564: 0.9). Unset: all train."""
    max_mean_ratio: float | None = Field(None, gt=1)
    """Skip a minibatch whose mean probability ratio exceeds this (VinePPO's code: 10). Costs one more forward pass."""


class KlConfig(Section):
    """Penalty on the distance from the frozen reference (the initial policy)."""

    coefficient: float = Field(0.0, ge=0)
    """beta. 0: no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the divergence, from one sample per token (k3 is GRPO's and VinePPO's)."""
    aggregation: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Mean over tokens, or summed per sequence and averaged over sequences (about |o| times stronger)."""
    clamp: float | None = Field(None, gt=0)
    """Upper bound of a token's estimate (VinePPO's code: 10)."""


class OptimizerConfig(Section):
    """AdamW and its schedule; one schedule step per optimizer step."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 clips nothing."""
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """Share of all optimizer steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the last step."""


class LearnerConfig(Section):
    """The learner's ranks and what one training step does."""

    ranks: int = Field(1, ge=1)
    """Data-parallel ranks, one Ray actor each."""
    cpus_per_rank: float = Field(1, gt=0)
    gpus_per_rank: float = Field(0, ge=0)
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too. In 16-bit formats 0 runs as 1."""
    minibatch_size: int | None = Field(None, ge=1)
    """Completions per optimizer step, over all ranks; continuations that train are spread over the same steps. Unset:
    the whole batch, one optimizer step."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch."""
    microbatch_size: int = Field(8, ge=1)
    """Sequences per forward pass of one rank."""
    loss: LossConfig = LossConfig()
    kl: KlConfig = KlConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the generated DeepSpeed configuration, for instance optimizer offload."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds the ranks may take to load the model and meet."""
    step_timeout: float = Field(3600.0, gt=0)
    """Seconds one training step, publication or checkpoint may take."""
