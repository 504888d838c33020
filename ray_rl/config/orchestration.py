"""The loops around rollouts and learner: batches, staleness, evaluation, checkpoints, records, Ray."""

from typing import Literal

from pydantic import Field

from ray_rl.config.labels import CustomResources, LabelSelector
from ray_rl.config.section import Section
from ray_rl.config.trackers import TrackerConfig

DecidedGroups = Literal["keep", "drop", "refill"]
"""What becomes of groups whose rewards are all equal."""


class TrainingConfig(Section):
    """How much is trained."""

    steps: int = Field(100, ge=1)
    """Training steps; each takes prompts_per_step groups and publishes one policy version."""
    prompts_per_step: int = Field(32, ge=1)
    """Groups per training step."""
    max_staleness: int = Field(0, ge=0)
    """Largest number of policy versions between sampling and training. 0: strictly on-policy."""
    decided_groups: DecidedGroups = "keep"
    """Groups whose rewards are all equal: group-relative advantages vanish there (VinePPO's need not). `keep`: train on
    them. `drop`: each step trains on what is left of its groups; a step without any leaves the policy as it is. `refill`:
    other prompts are sampled in their place (DAPO's dynamic sampling, arXiv 2503.14476)."""
    refill_limit: float = Field(4.0, ge=1, allow_inf_nan=False)
    """With `refill`: largest number of groups sampled for one step, in multiples of prompts_per_step. Past it, decided
    groups are trained on, so that a policy that solves everything (or nothing) does not sample for ever."""
    shuffle: bool = True
    """Visit the training problems in a seeded random order, another one each epoch."""
    warn_mismatch: float = Field(0.05, gt=0)
    """Warn when engine and learner differ by more than this in a token's log-probability, on average over a step trained on
    samples of the present version; older samples are expected to differ."""


class EvaluationConfig(Section):
    """Accuracy on held-out problems."""

    at_start: bool = True
    at_end: bool = True
    every: int = Field(0, ge=0)
    """Also after every so many steps; 0: not in between."""
    problems: int = Field(512, ge=1)
    """Held-out problems, from the first; all there are when fewer."""
    samples: int = Field(1, ge=1)
    """Completions per problem at the sampling temperature; more than one gives pass@k and majority@k too."""
    temperature: float = Field(1.0, gt=0)
    greedy: bool = True
    """Also one completion per problem without randomness (`eval/greedy`)."""


class CheckpointConfig(Section):
    """What allows a run to go on."""

    every: int = Field(20, ge=0)
    """Steps between checkpoints: what a learner or a driver that dies can cost. 0: only when the run ends or is interrupted, so
    that it costs everything."""
    keep: int = Field(2, ge=1)
    """Older ones are deleted."""


class LoggingConfig(Section):
    """What a run records besides metrics.jsonl."""

    tensorboard: bool = True
    ray_metrics: bool = True
    """Export the run's present numbers as Ray metrics (`ray_rl_*`), which Prometheus scrapes; deploy/grafana/ shows them."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Where metrics go besides, for instance `[wandb]` or `[{kind: mlflow, tracking_uri: URL}]`. One that fails or hangs never
    stops or slows the run."""
    groups_per_step: int = Field(2, ge=0)
    """Groups per step written to groups.jsonl: those with the best and the worst mean reward first."""
    watchdog_seconds: float = Field(900.0, gt=0)
    """A run in which nothing has moved for so long writes what each of its processes is doing to `stacks/` in its folder."""


class RayConfig(Section):
    """Which Ray the run uses."""

    address: str = "local"
    """`local` starts a private one, `auto` joins the one on this machine, or host:port. A Ray job always joins its cluster."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs a local Ray offers to actors. Unset: as many as the recipe's actors ask for, with room for at least 16 rollout
    actors (`ray-rl scale`), however many the machine has."""
    object_store_mib: int = Field(512, ge=80)
    """Shared memory of a local Ray's object store."""
    log_to_driver: bool = False
    """Repeat on this terminal what the actors print. It always lies in the logs of Ray's session."""
    placement_timeout: float = Field(10.0, gt=0)
    """Seconds to wait for resources that a cluster lacks before saying what is missing. Where an autoscaler must first start
    machines, as long as that takes: first those of the learner's ranks, and when these have their places, the others."""


class RewardActorsConfig(Section):
    """The reward actors; unused by rewards that run in place."""

    actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(0.5, ge=0)
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of a cluster that one actor takes."""
    labels: LabelSelector = Field(default_factory=dict)
    """What the labels of an actor's node must be; as `rollout.labels`."""
