"""What a training step reports: sums and maxima collected per microbatch, reduced over ranks once at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.distributed import max_over_ranks, sum_over_ranks
from learner.samples import loss_token_advantages
from ray_rl.types import TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchOutcome:
    """Detached results of one microbatch; all tensors [N], of its loss tokens, but the losses."""

    policy_loss: Tensor
    """Scalar, share of the minibatch's."""
    kl_loss: Tensor
    """Scalar, share of the minibatch's, coefficient included; 0 without a reference."""
    logprobs: Tensor
    old_logprobs: Tensor
    behavior_logprobs: Tensor
    entropy: Tensor
    clipped: Tensor
    kl: Tensor | None
    """Estimate per token; None without a reference."""


class StepStatistics:
    """Collects on one rank; `metrics` is a collective that every rank enters."""

    _SUMS = (
        "policy_loss",
        "kl_loss",
        "tokens",
        "entropy",
        "clipped",
        "ratio",
        "mismatch",
        "importance",
        "truncated",
        "kl",
    )
    _MAXIMA = ("ratio", "mismatch", "importance")

    def __init__(self, device: torch.device, *, importance_cap: float | None) -> None:
        """Of one step; without a cap nothing counts as truncated."""
        self._cap = math.inf if importance_cap is None else importance_cap
        self._sums = dict.fromkeys(self._SUMS, torch.zeros((), dtype=torch.float64, device=device))
        self._maxima = dict.fromkeys(self._MAXIMA, torch.zeros((), dtype=torch.float64, device=device))
        self._grad_norms: list[float] = []
        self._learning_rate = 0.0
        self._skipped = 0

    @property
    def optimizer_steps(self) -> int:
        """Minibatches that moved the weights so far."""
        return len(self._grad_norms)

    def add_step(self, *, grad_norm: float, learning_rate: float) -> None:
        """One optimizer step was taken."""
        self._grad_norms.append(grad_norm)
        self._learning_rate = learning_rate

    def add_skip(self) -> None:
        """One minibatch was left out."""
        self._skipped += 1

    @torch.no_grad()
    def add(self, outcome: MicrobatchOutcome) -> None:
        """Count one microbatch of this rank."""
        ratio = torch.exp(outcome.logprobs - outcome.old_logprobs)
        log_importance = outcome.old_logprobs - outcome.behavior_logprobs
        mismatch, importance = log_importance.abs(), torch.exp(log_importance)
        found = {
            "policy_loss": outcome.policy_loss,
            "kl_loss": outcome.kl_loss,
            "tokens": torch.tensor(len(ratio), device=ratio.device),
            "entropy": outcome.entropy.sum(),
            "clipped": outcome.clipped.sum(),
            "ratio": ratio.sum(),
            "mismatch": mismatch.sum(),
            "importance": importance.sum(),
            "truncated": (importance > self._cap).sum(),
        }
        if outcome.kl is not None:
            found["kl"] = outcome.kl.sum()
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value.double()
        for name, values in (("ratio", ratio), ("mismatch", mismatch), ("importance", importance)):
            if len(values):
                self._maxima[name] = torch.maximum(self._maxima[name], values.max().double())

    def metrics(self, *, with_kl: bool) -> dict[str, float]:
        """Means per loss token and per optimizer step, over all ranks, minibatches and epochs; names as users plot."""
        sums = dict(zip(self._SUMS, sum_over_ranks(torch.stack(list(self._sums.values()))).tolist(), strict=True))
        maxima = dict(zip(self._MAXIMA, max_over_ranks(torch.stack(list(self._maxima.values()))).tolist(), strict=True))
        steps, tokens = max(self.optimizer_steps, 1), max(sums["tokens"], 1.0)
        metrics = {
            "loss/policy": sums["policy_loss"] / steps,
            "loss/kl": sums["kl_loss"] / steps,
            "loss/total": (sums["policy_loss"] + sums["kl_loss"]) / steps,
            "policy/entropy": sums["entropy"] / tokens,
            "policy/clip_fraction": sums["clipped"] / tokens,
            "policy/ratio_mean": sums["ratio"] / tokens,
            "policy/ratio_max": maxima["ratio"],
            "policy/rollout_train_logprobs_abs_diff_mean": sums["mismatch"] / tokens,
            "policy/rollout_train_logprobs_abs_diff_max": maxima["mismatch"],
            "policy/importance_mean": sums["importance"] / tokens,
            "policy/importance_max": maxima["importance"],
            "policy/importance_truncated_fraction": sums["truncated"] / tokens,
            "policy/grad_norm": sum(self._grad_norms) / steps,
            "policy/lr": self._learning_rate,
            "policy/skipped_minibatches": float(self._skipped),
        }
        return metrics | ({"policy/kl": sums["kl"] / tokens} if with_kl else {})


def batch_metrics(samples: Sequence[TrainingSample]) -> dict[str, float]:
    """What trains, before whitening; advantages per loss token of any weight. All ranks hold the whole batch."""
    advantages = torch.tensor(loss_token_advantages(samples) or [0.0], dtype=torch.float64)
    tokens = sum(sample.loss_tokens for sample in samples)
    confident = sum(sample.confident_tokens for sample in samples)
    return {
        "advantage/mean": advantages.mean().item(),
        "advantage/std": advantages.std(correction=0).item(),
        "advantage/fraction_nonzero": (advantages != 0).double().mean().item(),
        "learner/tokens": float(tokens),
        "learner/continuations": float(sum(sample.is_continuation for sample in samples)),
        "loss/masked_fraction": confident / max(confident + tokens, 1),
    }
