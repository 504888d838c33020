"""One rank of the learner: forward and backward over microbatches, optimizer steps through DeepSpeed.

    samples -> old log-probabilities -> epochs x minibatches -> microbatches of this rank -> loss -> backward -> step

Everything here that reduces, gathers or steps is a collective: all ranks call it, with the same arguments.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learner.adapters import add_adapters, plain_parameters, without_adapters
from learner.batches import PackedBatch, TokenTable, loss_totals, pack_sequences, packed_batch
from learner.distributed import choose_device, meet, sum_over_ranks
from learner.losses import AGGREGATIONS, SURROGATES, Clip, LossTotals, importance_weights, kl_estimate, weighted_sum
from learner.model import Policy, gathered, load_model, sharing_is_exact, vocabulary_size
from learner.packing import pack, pack_sharing, split_minibatches
from learner.policy import initialize_policy, initialize_reference, reduce_gradients
from learner.samples import whiten
from learner.step_statistics import MicrobatchOutcome, StepStatistics, batch_metrics
from ray_rl.config.run import RunConfig
from ray_rl.errors import RunError
from ray_rl.garbage import uncollected
from ray_rl.types import Microbatch, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Minibatch:
    """What one optimizer step trains on, known whole by every rank."""

    indices: list[int]
    """Of the batch's samples."""
    samples: list[TrainingSample]
    """[len(indices)] with loss tokens, advantages as they enter the loss."""
    microbatches: list[Microbatch]
    """This rank's."""
    totals: LossTotals

    def batch_indices(self, microbatch: Microbatch) -> list[int]:
        """Rows of the microbatch as indices of the batch's samples."""
        return [self.indices[index] for index in microbatch.indices]


class LearnerEngine:
    """The policy, its optimizer and, when the KL term needs it, the frozen reference.

    Args:
        config: the run's.
        model_path: folder or Hugging Face name of the initial policy, `config.model.path` resolved.
        rank: of this process.
        world_size: data-parallel ranks.
        store: where the ranks meet; needed with more than one.
    """

    def __init__(
        self,
        config: RunConfig,
        model_path: str | os.PathLike[str],
        rank: int,
        world_size: int,
        store: torch.distributed.Store | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self.device = choose_device(config.learner)
        meet(self.device, rank, world_size, config.learner.step_timeout, store)
        with uncollected():  # it imports much of transformers
            policy = load_model(config.model, model_path)
        if config.learner.lora is not None:
            add_adapters(policy, config.learner.lora)
        self._shares = config.shares_prefixes and sharing_is_exact(policy)
        if config.learner.share_prefixes and not self._shares:
            raise RunError(
                "learner.share_prefixes: layers of this model see more than attention tells them; leave it out"
            )
        self.vocab_size = vocabulary_size(policy)
        heads = {"recompute_head": config.learner.recompute_head, "float32_head": config.learner.float32_head}
        self.deepspeed = initialize_policy(Policy(policy, **heads), config)
        self._sharded = self.deepspeed.zero_optimization_stage() == 3
        self._reference = None
        self._penalizes = config.learner.kl.coefficient > 0
        if self._penalizes and config.learner.lora is None:
            frozen = load_model(config.model, model_path, trainable=False)
            home = torch.device("cpu") if config.learner.kl.offload_reference else self.device
            self._reference = initialize_reference(Policy(frozen, **heads), config, home)

    def train(self, samples: Sequence[TrainingSample], step: int) -> dict[str, float]:
        """One training step: every epoch and minibatch of the batch.

        Args:
            samples: the whole batch, the same on every rank; continuations change nothing about the number of
                optimizer steps.
            step: of the run, from 1; with the run's seed it decides the order of the minibatches.

        Returns:
            Metrics, the same on every rank.

        Raises:
            ValueError: no samples.
        """
        if not samples:
            raise ValueError("the learner got an empty batch")
        order = self._minibatch_order(samples, step)
        metrics = batch_metrics(samples)
        if self.config.advantage.whiten == "batch":
            samples = whiten(samples)
        # With a single optimizer step the policy of the loss still is the policy at the start of the step.
        old = self._table(self.deepspeed, samples) if len(order) > 1 else None
        reference = self._reference_table(samples) if self._penalizes else None
        statistics = StepStatistics(self.device, importance_cap=self.config.learner.loss.importance_cap)
        for indices in order:
            minibatch = self._minibatch(samples, indices)
            if self._skips(minibatch, old, statistics):
                statistics.add_skip()
            else:
                self._optimize(minibatch, old, reference, statistics)
        refresh = self.config.learner.kl.refresh_every
        if self._reference is not None and refresh is not None and step % refresh == 0:
            self._set_reference(self._full_parameters(self.model))
        return metrics | statistics.metrics(with_kl=reference is not None)

    def reference_parameters(self) -> dict[str, Tensor] | None:
        """Full parameters of a reference that may be another than the initial policy, by name, on the CPU; else None."""
        if self._reference is None or self.config.learner.kl.refresh_every is None:
            return None
        return dict(self._full_parameters(_transformers_model(self._reference)))

    def restore_reference(self, parameters: Mapping[str, Tensor]) -> None:
        """The inverse of `reference_parameters`."""
        self._set_reference(parameters.items())

    @property
    def model(self) -> PreTrainedModel:
        """The policy as transformers knows it."""
        return _transformers_model(self.deepspeed)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:] under the current policy at temperature 1; [P - 1] for [P] tokens."""
        sequences = pack_sequences([tuple(token_ids)], self.device)
        predicting = torch.arange(len(token_ids) - 1, device=self.device)
        with torch.no_grad():
            logprobs, _ = self.deepspeed(sequences, predicting, sequences.input_ids[0, 1:], 1.0)
        return logprobs.tolist()

    def parameter_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and shape of what `named_parameters_gathered` gives, in its order. No collective."""
        dtype = getattr(torch, self.config.model.dtype)
        return [(parameter.name, dtype, parameter.shape) for parameter in plain_parameters(self.model)]

    def parameter_bytes(self) -> list[int]:
        """Sizes of what `named_parameters_gathered` gives, in its order."""
        itemsize = getattr(torch, self.config.model.dtype).itemsize
        return [parameter.numel * itemsize for parameter in plain_parameters(self.model)]

    def named_parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and full tensor of each parameter in `config.model.dtype`, tied ones once.

        Under ZeRO-3 each parameter is gathered when its turn comes, so all ranks iterate in lockstep, to the end. The
        tensors are for reading before the next training step: without ZeRO-3 they share memory with the policy.
        """
        dtype = getattr(torch, self.config.model.dtype)
        for parameter in plain_parameters(self.model):
            with gathered(parameter.sources, sharded=self._sharded):
                tensor = parameter.value().to(dtype, copy=self._sharded)
            yield parameter.name, tensor

    def _full_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            with gathered([parameter], sharded=self._sharded):
                full = parameter.detach().to("cpu", copy=True)
            yield name, full

    def _set_reference(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        assert self._reference is not None
        own = dict(_transformers_model(self._reference).named_parameters())
        for name, full in parameters:
            with gathered([own[name]], sharded=self._sharded, written_by=0):
                if not self._sharded or self.rank == 0:
                    own[name].data.copy_(full)

    def _minibatch_order(self, samples: Sequence[TrainingSample], step: int) -> list[list[int]]:
        learner = self.config.learner
        kinds = [sample.is_continuation for sample in samples]
        size = learner.minibatch_size or len(samples)
        seeds = (hash((self.config.seed, step, epoch)) for epoch in range(learner.epochs))
        return [indices for seed in seeds for indices in split_minibatches(kinds, size, seed)]

    def _minibatch(self, samples: Sequence[TrainingSample], indices: list[int]) -> _Minibatch:
        # What a failed grading or the confident-token mask left without loss tokens would only cost forward passes.
        indices = [index for index in indices if samples[index].loss_tokens]
        chosen = [samples[index] for index in indices]
        if self.config.advantage.whiten == "minibatch":
            chosen = whiten(chosen)
        totals = loss_totals(chosen, max_tokens=self.config.rollout.max_tokens)
        return _Minibatch(indices=indices, samples=chosen, microbatches=self._microbatches(chosen), totals=totals)

    def _microbatches(self, samples: Sequence[TrainingSample]) -> list[Microbatch]:
        """This rank's."""
        limits = {"ranks": self.world_size, "microbatch_tokens": self.config.learner.microbatch_tokens}
        rows = [sample.token_ids for sample in samples]
        shares = pack_sharing(rows, **limits) if self._shares else pack([len(row) for row in rows], **limits)
        return shares[self.rank]

    def _packed(self, samples: Sequence[TrainingSample], microbatch: Microbatch) -> PackedBatch:
        return packed_batch(samples, microbatch, self.device, share=self._shares)

    def _table(self, model: Callable[..., tuple[Tensor, Tensor]], samples: Sequence[TrainingSample]) -> TokenTable:
        """Log-probabilities of all samples under a model, at the sampling temperature."""

        @torch.no_grad()
        def logprobs(microbatch: Microbatch) -> Tensor:
            return self._forward(model, self._packed(samples, microbatch))[0]

        table = TokenTable(samples, self.device)
        table.fill(samples, self._microbatches(samples), logprobs)
        return table

    def _reference_table(self, samples: Sequence[TrainingSample]) -> TokenTable:
        if self._reference is None:
            with without_adapters(self.model):
                return self._table(self.deepspeed, samples)
        if not self.config.learner.kl.offload_reference:
            return self._table(self._reference, samples)
        self._reference.to(self.device)
        try:
            return self._table(self._reference, samples)
        finally:
            self._reference.to("cpu")

    def _forward(self, model: Callable[..., tuple[Tensor, Tensor]], batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return model(batch.sequences, batch.predicting, batch.targets, self.config.rollout.temperature)

    def _skips(self, minibatch: _Minibatch, old: TokenTable | None, statistics: StepStatistics) -> bool:
        """Whether a minibatch has nothing to train on, or its mean ratio is out of bounds (VinePPO's code)."""
        if not minibatch.samples:
            return True
        limit = self.config.learner.loss.max_mean_ratio
        if limit is None or old is None or statistics.optimizer_steps == 0:
            return False
        return self._mean_ratio(minibatch, old) > limit

    @torch.no_grad()
    def _mean_ratio(self, minibatch: _Minibatch, old: TokenTable) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for microbatch in minibatch.microbatches:
            batch = self._packed(minibatch.samples, microbatch)
            logprobs, _ = self._forward(self.deepspeed, batch)
            ratio = torch.exp(logprobs - old.rows(minibatch.batch_indices(microbatch)))
            total += weighted_sum(ratio, batch.tokens)
        return sum_over_ranks(total).item() / minibatch.totals.tokens

    def _optimize(
        self, minibatch: _Minibatch, old: TokenTable | None, reference: TokenTable | None, statistics: StepStatistics
    ) -> None:
        for microbatch in minibatch.microbatches:
            batch = self._packed(minibatch.samples, microbatch)
            rows = minibatch.batch_indices(microbatch)
            outcome, loss = self._loss(
                batch,
                minibatch.totals,
                old=None if old is None else old.rows(rows),
                reference=None if reference is None else reference.rows(rows),
            )
            # DeepSpeed averages gradients over ranks, while the loss already is a share of the whole minibatch.
            self.deepspeed.backward(loss * self.world_size, scale_wrt_gas=False)
            statistics.add(outcome)
        learning_rate = self.deepspeed.get_lr()[0]
        grad_norm = reduce_gradients(self.deepspeed)
        if grad_norm is not None:
            self._checked(grad_norm, statistics)
        self.deepspeed.step()
        if grad_norm is None:
            told = self.deepspeed.get_global_grad_norm()
            grad_norm = math.nan if told is None else self._checked(float(told), statistics)
        statistics.add_step(grad_norm=grad_norm, learning_rate=learning_rate)

    def _checked(self, norm: float, statistics: StepStatistics) -> float:
        """In float16 an overflow is the loss scaler's daily business; elsewhere it ruins the policy for good."""
        if self.config.model.dtype != "float16" and not math.isfinite(norm):
            raise RunError(
                f"the gradient of the batch's optimizer step {statistics.optimizer_steps + 1} is not finite ({norm}): "
                "lower learner.optimizer.lr, or look for extreme rewards or log-probabilities in groups.jsonl"
            )
        return norm

    def _loss(
        self, batch: PackedBatch, totals: LossTotals, *, old: Tensor | None, reference: Tensor | None
    ) -> tuple[MicrobatchOutcome, Tensor]:
        settings, kl = self.config.learner.loss, self.config.learner.kl
        logprobs, entropy = self._forward(self.deepspeed, batch)
        old = logprobs.detach() if old is None else old
        clip = Clip(low=settings.clip_low, high=settings.clip_high, dual=settings.clip_dual)
        per_token, clipped = SURROGATES[settings.kind](logprobs, old, batch.advantages, batch.tokens, clip)
        per_token = per_token * importance_weights(old, batch.behavior_logprobs, settings.importance_cap)
        policy_loss = AGGREGATIONS[settings.aggregation](per_token, batch.tokens, totals)
        estimate, kl_loss = None, torch.zeros((), device=self.device)
        if reference is not None:
            estimate = kl_estimate(logprobs, reference, estimator=kl.estimator, clamp=kl.clamp)
            kl_loss = kl.coefficient * AGGREGATIONS[kl.aggregation](estimate, batch.tokens, totals)
        outcome = MicrobatchOutcome(
            policy_loss=policy_loss.detach(),
            kl_loss=kl_loss.detach(),
            logprobs=logprobs.detach(),
            old_logprobs=old,
            behavior_logprobs=batch.behavior_logprobs,
            entropy=entropy,
            clipped=clipped,
            kl=None if estimate is None else estimate.detach(),
        )
        return outcome, policy_loss + kl_loss


def _transformers_model(policy: Any) -> PreTrainedModel:
    """Inside of a `Policy`, which DeepSpeed may have wrapped."""
    return getattr(policy, "module", policy).model
