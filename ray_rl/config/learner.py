"""The learner: losses, optimizer, DeepSpeed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_rl.config import deepspeed
from ray_rl.config.labels import CustomResources, LabelSelector
from ray_rl.config.section import Section

Packing = Literal["pack", "strict_pack", "spread"]
"""How the learner's ranks are laid out over nodes."""


class LossConfig(Section):
    """A policy-gradient surrogate per token, summed and divided by global counts."""

    kind: Literal["ppo", "gspo", "cispo"] = "ppo"
    """`ppo`: the clipped surrogate, token by token. `gspo`: clipped by one ratio per sequence (arXiv 2507.18071; its clips are
    3e-4 and 4e-4, its aggregation sequence_mean). `cispo`: log-probabilities with clipped weights (arXiv 2506.13585)."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high ("clip-higher" when larger than clip_low)."""
    clip_dual: float | None = Field(None, gt=1)
    """Largest ratio with which a token of negative advantage is pushed down (arXiv 1912.09729: 3); `ppo` and `gspo`."""
    importance_cap: float | None = Field(None, gt=0)
    """Each token's loss is multiplied with the learner's probability over the engine's, at most this (truncated importance
    sampling; 2 is usual): for what the engine computed otherwise, or with older weights. Unset: no correction."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"
    """`sequence_mean`: mean over each sequence's tokens, then over sequences (GRPO). `token_mean`: over all tokens of the
    minibatch (DAPO). `constant`: sum over tokens, divided by sequences times rollout.max_tokens (Dr. GRPO)."""
    confident_above: float | None = Field(None, gt=0, le=1)
    """Tokens that the policy sampled with at least this probability do not train, and no mean counts them (SPO, arXiv
    2505.23564: 0.9). Unset: all train."""
    max_mean_ratio: float | None = Field(None, gt=1)
    """Skip a minibatch whose mean probability ratio exceeds this (VinePPO's code: 10). Costs one more forward pass."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "LossConfig":
        if self.kind == "cispo" and self.clip_dual is not None:
            raise ValueError("clip_dual: cispo clips weights, not the loss; use clip_high, or kind=ppo")
        return self


class KlConfig(Section):
    """Penalty on the distance from the frozen reference (the initial policy, unless it is refreshed)."""

    coefficient: float = Field(0.0, ge=0)
    """beta. 0: no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the divergence, from one sample per token (k3 is GRPO's and VinePPO's)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """As the loss's; and `sequence_sum`, summed per sequence and averaged over sequences (VinePPO's code): about |o| times as
    strong as the means."""
    clamp: float | None = Field(None, gt=0)
    """Upper bound of a token's estimate (VinePPO's code: 10)."""
    refresh_every: int | None = Field(None, ge=1)
    """Training steps after which the reference becomes the policy of that moment (iterative GRPO, arXiv 2402.03300). Unset:
    it stays the initial policy."""

    offload_reference: bool = False
    """The reference stays in the host's memory and visits the GPU once a step, for its log-probabilities. Without GPUs it is
    there anyway."""

    @model_validator(mode="after")
    def _has_a_reference(self) -> "KlConfig":
        for name, wanted in {
            "refresh_every": self.refresh_every is not None,
            "offload_reference": self.offload_reference,
        }.items():
            if wanted and self.coefficient == 0:
                raise ValueError(
                    f"{name}: without a coefficient there is no reference; set coefficient, or leave it out"
                )
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685, through PEFT): they alone train; engines and exports get the merged weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """The adapter's product is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one, for instance [q_proj, v_proj]; all but the head."""


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
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of a cluster that one rank takes."""
    labels: LabelSelector = Field(default_factory=dict)
    """What the labels of a rank's node must be; as `rollout.labels`."""
    packing: Packing = "pack"
    """Where the ranks go, whose places are reserved together before other actors ask. `pack`: on as few nodes as possible;
    `strict_pack`: on one; `spread`: on different ones where possible."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too. In 16-bit formats 0 runs as 1."""
    minibatch_size: int | None = Field(None, ge=1)
    """Completions per optimizer step, over all ranks; continuations that train are spread over the same steps. Unset:
    the whole batch, one optimizer step."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch."""
    microbatch_tokens: int = Field(4096, ge=1)
    """Most tokens of one forward pass of one rank, prompts included. Sequences are packed without padding; one that is longer
    has a pass of its own."""
    share_prefixes: bool | None = None
    """Tokens that several sequences of a forward pass start with (a group's prompt, what continuations continue) are computed
    once; microbatch_tokens counts them once. Unset: where model.attention is sdpa, which alone can, and the model has no
    layers but attention that look at other tokens."""
    recompute_head: bool = True
    """Logits are computed once more in the backward pass instead of being kept, which takes a vocabulary's floats per token."""
    float32_head: bool = True
    """With a 16-bit model.dtype, logits are computed in float32 all the same: rounded to bfloat16 they are off by hundredths."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; the reference of the KL term is then the policy without them. Unset: all."""
    loss: LossConfig = LossConfig()
    kl: KlConfig = KlConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the generated DeepSpeed configuration: its settings, or the path of a JSON file with them. "auto" leaves a
    setting to us; what contradicts an option of the recipe is an error."""
    offload_optimizer: bool = False
    """Master weights and optimizer state stay in the memory of the host, which computes the update (ZeRO-offload); needs
    zero_stage 1 or more."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds the ranks may take to load the model and meet."""
    step_timeout: float = Field(3600.0, gt=0)
    """Seconds one training step, publication or checkpoint may take."""
    max_restarts: int = Field(3, ge=0)
    """How often in a sitting the ranks are started anew from the last checkpoint when one of them dies (`checkpoint.every`
    says what that costs); then the run ends."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = deepspeed.read(Path(given))
        return deepspeed.without_auto(given) if isinstance(given, Mapping) else given
