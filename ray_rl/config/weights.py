"""How new weights travel from the learner to the engines."""

from typing import Annotated, Literal

from pydantic import Field

from ray_rl.config.section import Section


class WeightSection(Section):
    """What every transport shares."""

    running: Literal["keep", "wait"] = "keep"
    """What becomes of completions that run when weights arrive. `keep`: they go on under the new ones at once, and the record
    tells which version sampled which tokens. `wait`: the engine first completes them under the old ones, within `timeout`, and
    nothing else starts; only what it had put aside for want of cache goes on under the new ones."""
    timeout: float = Field(600.0, gt=0)
    """Seconds one publication to all engines may take."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Largest difference between engine and learner in a log-probability of the probe prompt. Unset: 1e-4 in float32;
    0.05 in float32 on GPUs, where vLLM's attention multiplies in TF32; 1 in 16-bit formats, whose rounding differs between
    the two: that tells another policy, but not the policy of one step before."""


class ObjectStoreWeights(WeightSection):
    """One shared-memory file per node that all its engines map; Ray's object store brings it to other nodes than the
    learner's. Any network, CPU and GPU."""

    kind: Literal["object_store"] = "object_store"
    chunk_mib: int = Field(64, ge=1)
    """Size of one object in the store."""


class NcclWeights(WeightSection):
    """vLLM's NCCL broadcast from the learner's first rank to all engines; GPUs only."""

    kind: Literal["nccl"] = "nccl"


WeightsConfig = Annotated[ObjectStoreWeights | NcclWeights, Field(discriminator="kind")]
