"""Writes trl_losses.json: TRL's GRPO losses and their gradients on fixed tensors. Needs `pip install trl==1.16.0`.

python -m tests.learner.record_trl_losses
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = Path(__file__).with_name("trl_losses.json")

# As TRL names its options.
BASE = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo with kl": {"loss_type": "grpo", "beta": 0.04},
    "dapo": {},
    "dapo with kl": {"beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dr_grpo with kl": {"loss_type": "dr_grpo", "beta": 0.04},
    "dual clip": {"delta": 1.5},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.4},
    "truncated importance sampling": {"importance_cap": 1.3},
}
MAX_TOKENS = 8


def tensors() -> dict[str, torch.Tensor]:
    """Four completions of 6, 3, 5 and 1 tokens: log-probabilities now, at the step's start, of reference and engine."""
    random = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=random, dtype=torch.float64) * 3

    def near(spread: float) -> torch.Tensor:
        return old + spread * torch.randn(4, 6, generator=random, dtype=torch.float64)

    return {
        "mask": (torch.arange(6) < torch.tensor([[6], [3], [5], [1]])).double(),
        "old": old,
        "logprobs": near(0.3),
        "reference": near(0.5),
        "behavior": near(0.3),
        "advantages": torch.tensor([1.3, -0.7, -1.1, 0.5], dtype=torch.float64),
    }


def record(options: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """TRL's loss of one microbatch that is the whole batch."""
    from trl import GRPOTrainer

    options = {**BASE, **options}
    logprobs = given["logprobs"].clone().requires_grad_()
    mask, cap = given["mask"], options.pop("importance_cap", None)
    trainer = SimpleNamespace(
        **options,
        args=SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 6, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": given["advantages"],
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(),
    }
    if cap is not None:
        # What TRL computes when it samples, with vllm_importance_sampling_mode="token_truncate".
        inputs["importance_sampling_ratio"] = torch.exp(given["old"] - given["behavior"]).clamp(max=cap)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return {"options": {**options, "importance_cap": cap}, "loss": loss.item(), "gradient": logprobs.grad.tolist()}


if __name__ == "__main__":
    inputs = tensors()
    content = {
        "trl": "1.16.0",
        "max_tokens": MAX_TOKENS,
        "tensors": {name: tensor.tolist() for name, tensor in inputs.items()},
        "cases": {name: record(options, inputs) for name, options in CASES.items()},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")
