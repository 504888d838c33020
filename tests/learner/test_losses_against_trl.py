"""Where TRL has the same loss, its number and its gradient on the same tensors (recorded by record_trl_losses)."""

import json

import pytest
import torch

from learner.losses import AGGREGATIONS, SURROGATES, Clip, LossTokens, LossTotals, importance_weights, kl_estimate
from tests.learner.record_trl_losses import FILE

RECORDED = json.loads(FILE.read_text())
AGGREGATION = {"grpo": "sequence_mean", "dapo": "token_mean", "cispo": "token_mean", "dr_grpo": "constant"}
"""TRL's loss_type -> our learner.loss.aggregation, of the KL term as well."""


def clip_of(options) -> Clip:
    if options["loss_type"] == "cispo":  # there, epsilon_high is the largest weight itself
        return Clip(low=1.0, high=options["epsilon_high"] - 1)
    return Clip(low=options["epsilon_low"], high=options["epsilon_high"], dual=options.get("delta"))


def kind_of(options) -> str:
    if options["importance_sampling_level"] == "sequence":
        return "gspo"
    return "cispo" if options["loss_type"] == "cispo" else "ppo"


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_loss_and_gradient_are_trls(name):
    case, tensors = RECORDED["cases"][name], RECORDED["tensors"]
    options = case["options"]
    mask = torch.tensor(tensors["mask"]).bool()
    flat = {key: torch.tensor(tensors[key], dtype=torch.float64)[mask] for key in ("old", "reference", "behavior")}
    logprobs = torch.tensor(tensors["logprobs"], dtype=torch.float64)[mask].requires_grad_()
    counts = mask.sum(dim=1)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    advantages = torch.tensor(tensors["advantages"], dtype=torch.float64)[sequence]
    tokens = LossTokens(weights=torch.ones_like(logprobs), sequence=sequence, counts=counts)
    totals = LossTotals(tokens=int(mask.sum()), sequences=len(counts), max_tokens=RECORDED["max_tokens"])
    aggregate = AGGREGATIONS[AGGREGATION[options["loss_type"]]]

    per_token, clipped = SURROGATES[kind_of(options)](logprobs, flat["old"], advantages, tokens, clip_of(options))
    per_token = per_token * importance_weights(flat["old"], flat["behavior"], options["importance_cap"])
    loss = aggregate(per_token, tokens, totals)
    if options["beta"]:
        estimate = kl_estimate(logprobs, flat["reference"], estimator="k3", clamp=None)
        loss = loss + options["beta"] * aggregate(estimate, tokens, totals)
    loss.backward()

    assert clipped.any(), "the tensors are such that every case clips some tokens"
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)[mask]
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-6, rtol=0)
