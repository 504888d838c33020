"""The rollout actors: how many, what each may use, how they sample."""

import math

from pydantic import Field, field_validator, model_validator

from ray_rl.config.labels import CustomResources, LabelSelector
from ray_rl.config.section import Section


class ActorRange(Section):
    """Between how many rollout actors a run may choose while it goes on."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> "ActorRange":
        if self.min > self.max:
            raise ValueError(f"max: {self.max} is less than min = {self.min}; swap them")
        return self


class RolloutConfig(Section):
    """Sampling, and the engines that do it."""

    group_size: int = Field(8, ge=1)
    """G, completions per prompt."""
    max_tokens: int = Field(128, ge=1)
    """Longest completion, in tokens. A continuation may use what its prefix has left of them."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of completions and continuations; the learner divides its logits by the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Below 1 the learner's full-softmax log-probabilities differ from the sampling distribution."""
    stop_token_ids: tuple[int, ...] = ()
    """End a completion, besides the model's own end-of-sequence tokens."""
    num_actors: int | ActorRange = 1
    """Rollout actors, one engine each: so many; or `{min: 1, max: 4}`, beginning with `min`: one more whenever the learner has
    waited long for groups, one fewer when finished groups have waited long for it. `ray-rl scale` changes either."""
    cpus_per_actor: float = Field(1, gt=0)
    """Ray CPUs of one actor, and (rounded down, at least 1) the threads of its engine on CPU."""
    gpus_per_actor: float = Field(0, ge=0)
    """Ray GPUs of one actor; 0 runs the engine on CPU."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of a cluster that one actor takes, for instance `{fast_disk: 1}`."""
    labels: LabelSelector = Field(default_factory=dict)
    """What the labels of an actor's node must be, as in Ray's label selectors: `{pool: rollout}`, `{pool: "!learner"}`,
    `{ray.io/accelerator-type: "in(H100,H200)"}`. Its engine's processes are always on the actor's node."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that share one engine's weights."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory of the key-value cache. Unset: 1 GiB on CPU, and on a GPU what `gpu_memory_share` leaves."""
    gpu_memory_share: float = Field(0.85, gt=0, le=1)
    """Share that an engine may take of the memory of each of its GPUs; where `gpus_per_actor` is below 1, of that part of one.
    A part wants `kv_cache_gib` as well: without it vLLM measures, and stumbles over what the neighbour does meanwhile."""
    block_size: int = Field(32, ge=1)
    """Tokens per cache block; only whole blocks of a prefix are found again."""
    max_sequences: int = Field(256, ge=1)
    """Sequences an engine runs at once."""
    enforce_eager: bool | None = None
    """No graph capture. Unset: eager on CPU (exact log-probabilities, quick start), captured on GPU."""
    groups_in_flight: int | None = Field(None, ge=1)
    """Groups that one actor works on at once. Unset: twice as many as fill its engine with completions, so that its batch stays
    full while groups wait for their last completions; the engine lets older groups go first."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds an actor may take to load its engine."""
    group_timeout: float = Field(1800.0, gt=0)
    """Seconds one group may take from prompt to values, the time that it waits in its engine's queue included. An actor that
    takes longer is replaced."""
    outage_timeout: float = Field(900.0, gt=0)
    """Seconds for which the run waits when no rollout actor is left; then it ends with a checkpoint."""
    max_attempts: int = Field(3, ge=1)
    """Actors that one prompt may cost: when it was in so many that died or hung, it is dropped (ledger: `failed`)."""

    @field_validator("num_actors")
    @classmethod
    def _is_positive(cls, given: int | ActorRange) -> int | ActorRange:
        if isinstance(given, int) and given < 1:
            raise ValueError("use at least 1, or {min: 1, max: 4}")
        return given

    @property
    def least_actors(self) -> int:
        """The number of actors a run begins with."""
        return self.num_actors if isinstance(self.num_actors, int) else self.num_actors.min

    @property
    def most_actors(self) -> int:
        """The largest number of actors that the configuration allows."""
        return self.num_actors if isinstance(self.num_actors, int) else self.num_actors.max

    @property
    def most_groups(self) -> int:
        """Groups that one actor works on at once, as configured or derived."""
        return self.groups_in_flight or 2 * math.ceil(self.max_sequences / self.group_size)
