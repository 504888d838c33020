"""Masked and weighted samples in the learner's engine: real DeepSpeed, one rank, a tiny Llama."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.learner.engines import (
    PROMPT,
    blank,
    largest_difference,
    make_engine,
    make_samples,
    weights,
    with_continuations,
)
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("whiten", ["none", "minibatch"])
def test_a_minibatch_that_the_mask_emptied_is_skipped_and_the_others_train(model_path, whiten):
    samples = make_samples()
    samples[3] = blank(samples[3])
    overrides = ("learner.minibatch_size=1", "learner.kl.coefficient=0.01", f"advantage.whiten={whiten}")
    engine = make_engine(model_path, *overrides)
    metrics = engine.train(samples, 0)
    assert metrics["policy/skipped_minibatches"] == 1.0
    assert engine.deepspeed.global_steps == 7
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(tensor.isfinite().all() for tensor in weights(engine).values())


def test_samples_that_the_mask_emptied_leave_the_update_as_it_was(model_path):
    engines = [make_engine(model_path, "learner.optimizer.eps=1e-4") for _ in range(2)]
    samples = make_samples()
    metrics = [
        engine.train(batch, 0)
        for engine, batch in zip(engines, (samples, [*samples, blank(samples[0]), blank(samples[1])]), strict=True)
    ]
    assert largest_difference(weights(engines[0]), weights(engines[1])) < 1e-6
    left_out, trained = samples[0].loss_tokens + samples[1].loss_tokens, sum(s.loss_tokens for s in samples)
    assert metrics[0]["loss/masked_fraction"] == 0.0
    assert metrics[1]["loss/masked_fraction"] == pytest.approx(left_out / (left_out + trained))


def test_a_step_on_weighted_continuations_follows_plain_pytorch(model_path):
    """Only a continuation's own tokens have a gradient, each by its weight; the prefix has none."""
    samples = with_continuations()
    engine = make_engine(model_path, "learner.optimizer.eps=1e-4", "learner.optimizer.grad_clip=0")
    metrics = engine.train(samples, 0)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.0)
    total = sum(sum(sample.weights) for sample in samples)
    for sample in samples:
        distribution = torch.log_softmax(model(torch.tensor([sample.token_ids])).logits[0, :-1], dim=-1)
        start = PROMPT + 2 if sample.is_continuation else PROMPT
        for position in range(start, len(sample.token_ids)):
            share = sample.weights[position] * sample.advantages[position] / total
            (-share * distribution[position - 1, sample.token_ids[position]]).backward(retain_graph=True)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    optimizer.step()
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["learner/continuations"] == 5.0
    assert largest_difference(weights(engine), dict(model.named_parameters())) < 1e-5


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kl_aggregation", ["token_mean", "sequence_sum"])
def test_weighted_updates_do_not_depend_on_the_size_of_microbatches(model_path, aggregation, kl_aggregation):
    overrides = (
        "learner.minibatch_size=4",
        "learner.optimizer.eps=1e-4",
        "learner.kl.coefficient=0.1",
        f"learner.loss.aggregation={aggregation}",
        f"learner.kl.aggregation={kl_aggregation}",
        "advantage.whiten=minibatch",
    )
    engines = [make_engine(model_path, *overrides, f"learner.microbatch_tokens={size}") for size in (1, 200)]
    for engine in engines:
        engine.train(with_continuations(), 0)
    assert largest_difference(weights(engines[0]), weights(engines[1])) < 1e-5


@pytest.mark.parametrize(("overrides", "steps"), [((), 1), (("learner.minibatch_size=4", "learner.epochs=2"), 4)])
def test_continuations_add_no_optimizer_steps(model_path, overrides, steps):
    for samples in (make_samples(7), with_continuations(7, continuations=20)):
        engine = make_engine(model_path, *overrides)
        engine.train(samples, 0)
        assert engine.deepspeed.global_steps == steps


def test_the_mean_ratio_that_skips_a_minibatch_is_weighted(model_path):
    """The second completion, which rises, has nearly all of the weight, or the first one, which falls."""
    ratios = []
    for shares in ((1e-6, 1.0), (1.0, 1e-6)):
        samples = [
            replace(s, weights=tuple(w * share for w in s.weights))
            for s, share in zip(make_samples(2), shares, strict=True)
        ]
        engine = make_engine(model_path, "learner.optimizer.lr=0.01")
        old = engine._table(engine.deepspeed, samples)
        engine.train(make_samples(2), 0)
        ratios.append(engine._mean_ratio(engine._minibatch(samples, [0, 1]), old))
    assert ratios[0] > 1 > ratios[1]
