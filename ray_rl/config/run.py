"""The whole configuration of a run, and what must hold between its sections."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from ray_rl.config.advantage import AdvantageConfig, VineppoAdvantage
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
from ray_rl.config.task import ArithmeticTaskConfig, TaskConfig
from ray_rl.config.values import FixedValues, NoValues, ValuesConfig
from ray_rl.config.weights import NcclWeights, ObjectStoreWeights, WeightsConfig


class RunConfig(Section):
    """One run, from task to checkpoints."""

    name: str = "run"
    """Prefix of the run folder."""
    seed: int = 0
    """Of the prompt order, the engines' sampling and the minibatch order."""
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

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        faults = [*self._batch_faults(), *self._value_faults(), *self._device_faults(), *self._model_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

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

    def _device_faults(self) -> Iterator[str]:
        if isinstance(self.weights, NcclWeights) and not (self.rollout.gpus_per_actor and self.learner.gpus_per_rank):
            yield (
                "weights.kind: nccl needs GPUs on both ends (rollout.gpus_per_actor and learner.gpus_per_rank >= 1); "
                "use weights.kind=object_store"
            )
        if self.rollout.tensor_parallel > 1 and self.rollout.gpus_per_actor != self.rollout.tensor_parallel:
            yield (
                f"rollout.tensor_parallel: {self.rollout.tensor_parallel} needs as many GPUs per actor; "
                f"set rollout.gpus_per_actor={self.rollout.tensor_parallel}"
            )

    def _model_faults(self) -> Iterator[str]:
        path = self.model.path
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if path != "embedded" and looks_local and not Path(path).expanduser().is_dir():
            yield f"model.path: {path} does not exist; give a folder in Hugging Face format, or a Hugging Face name"
