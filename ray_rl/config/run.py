"""The whole configuration of a run, and what must hold between its sections."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationInfo, model_validator

from ray_rl.config.advantage import AdvantageConfig, VineppoAdvantage
from ray_rl.config.deepspeed import contradictions
from ray_rl.config.learner import LearnerConfig
from ray_rl.config.model import ModelConfig
from ray_rl.config.orchestration import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    RayConfig,
    RewardActorsConfig,
    TrainingConfig,
)
from ray_rl.config.reward import ExactRewardConfig, RewardConfig
from ray_rl.config.rollout import RolloutConfig
from ray_rl.config.section import Section
from ray_rl.config.segmentation import LinesSegmentation, SegmentationConfig
from ray_rl.config.task import ArithmeticTaskConfig, DatasetTaskConfig, TaskConfig
from ray_rl.config.values import AdaptiveValues, FixedValues, NoValues, ValuesConfig
from ray_rl.config.weights import NcclWeights, ObjectStoreWeights, WeightsConfig
from ray_rl.embedded import policy_path

_LONGEST_NAME = 100


class RunConfig(Section):
    """One run, from task to checkpoints."""

    name: str = "run"
    """Prefix of the run folder."""
    seed: int = 0
    """Of the prompt order, the engines' sampling and the minibatch order."""
    deterministic: bool = False
    """Every request is sampled with a seed of its own, which follows from the run's seed, its prompt's position and what it
    continues: whichever engine takes it, and after a resume. It costs speed."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = ArithmeticTaskConfig()
    reward: RewardConfig = ExactRewardConfig()
    reward_actors: RewardActorsConfig = RewardActorsConfig()
    rollout: RolloutConfig = RolloutConfig()
    segmentation: SegmentationConfig = LinesSegmentation()
    values: ValuesConfig = FixedValues()
    advantage: AdvantageConfig = VineppoAdvantage()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = ObjectStoreWeights()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    ray: RayConfig = RayConfig()

    @property
    def samples_per_step(self) -> int:
        """Completions that one training step consumes."""
        return self.training.prompts_per_step * self.rollout.group_size

    @property
    def minibatch_size(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.learner.minibatch_size or self.samples_per_step

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        return self.training.steps * self.learner.epochs * (self.samples_per_step // self.minibatch_size)

    @property
    def shares_prefixes(self) -> bool:
        """Whether the learner computes common prefixes once."""
        share = self.learner.share_prefixes
        return self.model.attention == "sdpa" if share is None else share

    @property
    def trains_on_continuations(self) -> bool:
        """Whether continuations enter the batch."""
        return not isinstance(self.values, NoValues) and self.values.train_on_continuations

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> "RunConfig":
        faults = list(_infinite("", self)) or [  # what is computed from such numbers would be told of in vain
            *self._name_faults(),
            *self._batch_faults(),
            *self._value_faults(),
            *self._reward_faults(),
            *self._device_faults(),
            *self._model_faults(elsewhere=bool((info.context or {}).get("elsewhere"))),
            *contradictions(self),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _name_faults(self) -> Iterator[str]:
        if not self.name.isprintable() or "/" in self.name or not 0 < len(self.name) <= _LONGEST_NAME:
            yield f"name: {self.name!r:.60} cannot be part of a folder's name; use up to {_LONGEST_NAME} characters without /"

    def _batch_faults(self) -> Iterator[str]:
        minibatch, batch = self.minibatch_size, self.samples_per_step
        if batch % minibatch:
            yield (
                f"learner.minibatch_size: {minibatch} does not divide training.prompts_per_step x rollout.group_size "
                f"= {self.training.prompts_per_step} x {self.rollout.group_size} = {batch}; choose a divisor of {batch}"
            )
        if minibatch < self.learner.ranks:
            yield (
                f"learner.minibatch_size: {minibatch} is fewer sequences than learner.ranks = {self.learner.ranks}; "
                "every rank needs at least one"
            )
        if self.rollout.max_tokens >= self.model.max_model_len:
            yield (
                f"rollout.max_tokens: {self.rollout.max_tokens} leaves no room for a prompt within model.max_model_len "
                f"= {self.model.max_model_len}; lower it or raise model.max_model_len"
            )

    def _value_faults(self) -> Iterator[str]:
        needs_values = self.advantage.kind == "vineppo"
        if not needs_values and self.rollout.group_size < 2:
            yield (
                f"rollout.group_size: 1 gives {self.advantage.kind} nothing to compare (every advantage would be 0); "
                "use at least 2, or advantage.kind=vineppo"
            )
        if needs_values and isinstance(self.values, NoValues):
            yield "values.kind: none, but advantage.kind=vineppo needs state values; use values.kind=fixed"
        if not needs_values and not isinstance(self.values, NoValues):
            yield (
                f"values.kind: {self.values.kind} would spend continuations that advantage.kind={self.advantage.kind} "
                "never uses; use values.kind=none"
            )

        if not isinstance(self.values, NoValues):
            yield from self._pool_faults(self.values)
        if isinstance(self.values, AdaptiveValues):
            yield from self._adaptive_faults(self.values)

    def _pool_faults(self, values: FixedValues | AdaptiveValues) -> Iterator[str]:
        pools = values.pooling != "none"
        if pools and self.rollout.top_p < 1:
            yield (
                f"values.pooling: {values.pooling} counts samples by the policy's own probabilities, and rollout.top_p = "
                f"{self.rollout.top_p:g} samples from others; use rollout.top_p=1 or values.pooling=none"
            )
        if values.train_on_continuations and values.num_continuations < 2 and not pools:
            yield (
                "values.train_on_continuations: with one continuation per state there is no other to compare it with; "
                "use values.num_continuations=2 or more, or values.pooling=passing"
            )

    def _adaptive_faults(self, values: AdaptiveValues) -> Iterator[str]:
        if values.token_budget * self.rollout.group_size < 1:
            least = 1 / self.rollout.group_size
            yield (
                f"values.token_budget: {values.token_budget:g} per token of {self.rollout.group_size} completions buys less "
                f"than one continuation of full length; use at least {least:g}, or values.kind=fixed"
            )
        (low, high), unfinished = values.reward_range, self.reward.unfinished
        if not low <= unfinished <= high:
            yield (
                f"values.reward_range: [{low:g}, {high:g}] leaves out reward.unfinished = {unfinished:g}; set it to the "
                "smallest and the largest reward there can be"
            )

    def _reward_faults(self) -> Iterator[str]:
        if self.reward.kind == "reasoning_gym" and self.task.kind == "arithmetic":
            yield (
                "reward.kind: reasoning_gym can only score problems that reasoning-gym made, and task.kind is arithmetic; "
                "use reward.kind=exact"
            )
        answerless = isinstance(self.task, DatasetTaskConfig) and self.task.answer_column is None
        if answerless and self.reward.kind in ("exact", "math"):
            yield (
                f"task.answer_column: null, but reward.kind={self.reward.kind} compares with a reference answer; "
                "name the column that holds it"
            )

    def _device_faults(self) -> Iterator[str]:
        rollout, learner = self.rollout, self.learner
        if isinstance(self.weights, NcclWeights) and min(rollout.gpus_per_actor, learner.gpus_per_rank) < 1:
            yield (
                "weights.kind: nccl needs GPUs on both ends (rollout.gpus_per_actor and learner.gpus_per_rank >= 1); "
                "use weights.kind=object_store"
            )
        if rollout.gpus_per_actor != rollout.tensor_parallel > 1:
            yield (
                f"rollout.tensor_parallel: {rollout.tensor_parallel} needs as many GPUs per actor; "
                f"set rollout.gpus_per_actor={rollout.tensor_parallel}"
            )
        elif rollout.gpus_per_actor > rollout.tensor_parallel:
            yield (
                f"rollout.gpus_per_actor: {rollout.gpus_per_actor:g}, of which an engine uses rollout.tensor_parallel = "
                f"{rollout.tensor_parallel}; raise the latter, or lower the first and raise rollout.num_actors"
            )
        if learner.kl.offload_reference and (learner.lora is not None or learner.zero_stage == 3):
            where = (
                "learner.lora the reference is the policy itself"
                if learner.lora
                else "ZeRO-3 it is sharded over the GPUs"
            )
            yield f"learner.kl.offload_reference: with {where}; leave it out"
        if learner.lora is not None and learner.kl.refresh_every is not None:
            yield (
                "learner.kl.refresh_every: with learner.lora the reference is the policy without its adapters, which never "
                "moves; leave one of the two out"
            )
        if learner.offload_optimizer and learner.zero_stage == 0:
            yield "learner.offload_optimizer: needs ZeRO; set learner.zero_stage=1 or more"
        if learner.gpus_per_rank > 1 or (learner.ranks > 1 and 0 < learner.gpus_per_rank < 1):
            yield (
                f"learner.gpus_per_rank: {learner.gpus_per_rank:g}, but a rank computes on one GPU, and several ranks never "
                "share one; set it to 1 and choose learner.ranks"
            )

    def _model_faults(self, *, elsewhere: bool) -> Iterator[str]:
        path = self.model.path
        unseen = elsewhere and path.startswith(("/", "~"))
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if path != "embedded" and looks_local and not unseen and not os.path.isdir(os.path.expanduser(path)):
            yield f"model.path: {path} does not exist; give a folder in Hugging Face format, or a Hugging Face name"
        positions = _positions(path)
        if positions is not None and self.model.max_model_len > positions:
            yield (
                f"model.max_model_len: {self.model.max_model_len} exceeds the {positions} positions of {path}; "
                f"use at most {positions}"
            )
        if self.model.dtype == "float16" and self.learner.gpus_per_rank == 0:
            yield (
                "model.dtype: float16, which DeepSpeed trains on GPUs only; use float32 or bfloat16, or set "
                "learner.gpus_per_rank=1"
            )
        if self.learner.share_prefixes and self.model.attention != "sdpa":
            yield (
                f"learner.share_prefixes: model.attention={self.model.attention} knows no shared prefixes; leave it out, or "
                "use model.attention=sdpa"
            )
        if self.model.attention == "flash_attention_2" and (
            self.model.dtype == "float32" or self.learner.gpus_per_rank == 0
        ):
            yield (
                "model.attention: flash_attention_2 needs GPUs (learner.gpus_per_rank) and a 16-bit model.dtype; "
                "use model.attention=sdpa"
            )
        if self.model.system_prompt is not None and self.model.chat_template is False:
            yield "model.system_prompt: needs a chat template, and model.chat_template is false; leave out one of the two"


def _positions(path: str) -> int | None:
    """Longest sequence of the embedded policy or of a model in a local folder; None where nothing here tells."""
    folder = policy_path() if path == "embedded" else os.path.expanduser(path)
    try:
        known = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever loads the model will say what is wrong with the file
    positions = known.get("max_position_embeddings", known.get("n_positions")) if isinstance(known, dict) else None
    return positions if isinstance(positions, int) else None


def _infinite(path: str, value: object) -> Iterator[str]:
    """Numbers that are none: nothing can be compared with nan, and no wait may be endless."""
    if isinstance(value, Section):
        for key, inner in value:
            yield from _infinite(f"{path}.{key}".lstrip("."), inner)
    elif isinstance(value, tuple):
        for index, inner in enumerate(value):
            yield from _infinite(f"{path}.{index}", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value} is not a finite number; use one"
