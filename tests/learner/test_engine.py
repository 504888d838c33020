"""The learner's engine in this process: real DeepSpeed, one rank, a tiny Llama."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.checkpoint import export_model, load_checkpoint, save_checkpoint
from tests.learner.engines import (
    PROMPT,
    blank,
    completion_logprob,
    largest_difference,
    make_engine,
    make_samples,
    weights,
)
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


def test_logprobs_are_those_of_the_model_in_transformers(model_path):
    tokens = make_samples(1)[0].token_ids
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = expected[range(len(tokens) - 1), list(tokens[1:])]
    assert make_engine(model_path).logprobs(tokens) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_step_follows_plain_pytorch(model_path):
    """Packing, microbatches, gradient norm, clipping and AdamW against a loop over single sequences."""
    samples = make_samples()
    engine = make_engine(model_path, "rollout.temperature=0.7", "learner.optimizer.grad_clip=0.5")
    metrics = engine.train(samples, 0)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    total = sum(sample.loss_tokens for sample in samples)
    entropy = 0.0
    for sample in samples:
        distribution = torch.log_softmax(model(torch.tensor([sample.token_ids])).logits[0, :-1] / 0.7, dim=-1)
        chosen = distribution[range(len(sample.token_ids) - 1), list(sample.token_ids[1:])]
        # At the policy that is its own old one the surrogate's gradient is that of -A log pi.
        (-(chosen * torch.tensor(sample.advantages[1:])).sum() / total).backward()
        entropy -= (distribution.exp() * distribution).sum(-1)[PROMPT - 1 :].sum().item() / total
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["policy/grad_norm"] > 0.5
    assert metrics["policy/entropy"] == pytest.approx(entropy, rel=1e-4)
    assert largest_difference(weights(engine), dict(model.named_parameters())) < 1e-5


def test_the_policy_moves_towards_praised_and_away_from_blamed_completions(model_path):
    engine, samples = make_engine(model_path), make_samples(2)
    before = [completion_logprob(engine, sample) for sample in samples]
    for step in range(3):
        engine.train(samples, step)
    after = [completion_logprob(engine, sample) for sample in samples]
    assert after[0] < before[0]
    assert after[1] > before[1] + 0.1


def test_recomputed_activations_give_the_same_update(model_path):
    kept, recomputed = make_engine(model_path), make_engine(model_path, "model.gradient_checkpointing=true")
    for engine in (kept, recomputed):
        engine.train(make_samples(), 0)
    assert recomputed.model.is_gradient_checkpointing
    assert largest_difference(weights(kept), weights(recomputed)) < 1e-6


def test_the_users_scheduler_replaces_ours(model_path):
    scheduler = "{type: WarmupLR, params: {warmup_max_lr: 0.004, warmup_num_steps: 2, warmup_type: linear}}"
    engine = make_engine(model_path, f"learner.deepspeed.scheduler={scheduler}")
    rates = [engine.train(make_samples(2), step)["policy/lr"] for step in range(4)]
    assert rates[-1] == pytest.approx(0.004)


def test_one_minibatch_is_exactly_on_policy(model_path):
    metrics = make_engine(model_path).train(make_samples(), 0)
    assert metrics["policy/ratio_mean"] == 1.0
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_fraction"] == 0.0


def test_the_learners_probability_over_the_engines_weighs_each_tokens_loss(model_path):
    """The engine said -3 for every token: at one optimizer step the gradient is that of advantages times the capped weight."""
    samples = make_samples()
    corrected = make_engine(model_path, "learner.loss.importance_cap=1.5", "learner.optimizer.eps=1e-4")
    weighed, metrics, ratios = [], corrected.train(samples, 0), []
    plain = make_engine(model_path, "learner.optimizer.eps=1e-4")
    for sample in samples:
        ratio = [math.exp(logprob + 3) for logprob in plain.logprobs(sample.token_ids)]
        weight = (0.0, *(min(value, 1.5) for value in ratio))
        advantages = tuple(a * w for a, w in zip(sample.advantages, weight, strict=True))
        weighed.append(replace(sample, advantages=advantages))
        ratios += ratio[PROMPT - 1 :]
    plain.train(weighed, 0)
    assert largest_difference(weights(corrected), weights(plain)) < 1e-6
    assert metrics["policy/importance_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert metrics["policy/importance_max"] == pytest.approx(max(ratios), rel=1e-4)
    share = sum(value > 1.5 for value in ratios) / len(ratios)
    assert metrics["policy/importance_truncated_fraction"] == pytest.approx(share)


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
def test_every_surrogate_moves_the_policy_as_ppo_does_on_its_own_samples(model_path, kind):
    engines = [
        make_engine(model_path, f"learner.loss.kind={name}", "learner.optimizer.eps=1e-4") for name in ("ppo", kind)
    ]
    for engine in engines:
        engine.train(make_samples(), 0)
    difference = largest_difference(weights(engines[0]), weights(engines[1]))
    # GSPO's gradient of a token is its sequence's mean advantage, which here is each token's own.
    assert difference < 1e-6


def test_later_minibatches_see_a_ratio_against_the_start_of_the_step(model_path):
    two = make_engine(model_path, "learner.minibatch_size=4", "learner.epochs=2").train(make_samples(), 0)
    assert two["policy/ratio_max"] > 1.01
    assert two["policy/ratio_mean"] != 1.0


def test_old_logprobs_computed_beforehand_equal_those_of_the_unmoved_policy(model_path):
    """At a vanishing learning rate all ratios are 1, though they come from other microbatches."""
    metrics = make_engine(model_path, "learner.epochs=2", "learner.optimizer.lr=1e-12").train(make_samples(), 0)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_mismatch_with_the_engine_is_measured_against_the_old_policy(model_path):
    samples = make_samples()
    engine = make_engine(model_path)
    old = [engine.logprobs(sample.token_ids)[PROMPT - 1 :] for sample in samples]
    differences = [abs(value + 3.0) for row in old for value in row]
    for overrides in ((), ("learner.minibatch_size=4",)):
        metrics = make_engine(model_path, *overrides).train(samples, 0)
        mean = metrics["policy/rollout_train_logprobs_abs_diff_mean"]
        assert mean == pytest.approx(sum(differences) / len(differences), rel=1e-4)
        assert metrics["policy/rollout_train_logprobs_abs_diff_max"] == pytest.approx(max(differences), rel=1e-4)


def test_a_penalty_on_divergence_holds_the_policy_back(model_path):
    samples = make_samples()
    free = make_engine(model_path)
    held = make_engine(model_path, "learner.kl.coefficient=100")
    for step in range(3):
        free.train(samples, step)
        metrics = held.train(samples, step)
    start = make_engine(model_path)
    moved = [
        sum(abs(completion_logprob(engine, s) - completion_logprob(start, s)) for s in samples)
        for engine in (free, held)
    ]
    assert moved[1] < moved[0]
    assert metrics["policy/kl"] > 0
    assert metrics["loss/kl"] == pytest.approx(100 * metrics["policy/kl"], rel=1e-5)


def test_the_reference_becomes_the_policy_every_so_many_steps(model_path, tmp_path):
    overrides = ("learner.kl.coefficient=0.1", "learner.kl.refresh_every=2", "learner.minibatch_size=4")
    engine = make_engine(model_path, *overrides)
    initial = weights(engine)
    engine.train(make_samples(), 1)
    assert largest_difference(engine.reference_parameters(), initial) == 0.0
    engine.train(make_samples(), 2)
    refreshed = weights(engine)
    engine.train(make_samples(), 3)
    assert largest_difference(engine.reference_parameters(), refreshed) == 0.0
    assert largest_difference(weights(engine), refreshed) > 0.0
    save_checkpoint(engine, tmp_path / "checkpoint")
    restored = make_engine(model_path, *overrides)
    load_checkpoint(restored, tmp_path / "checkpoint")
    assert largest_difference(restored.reference_parameters(), refreshed) == 0.0
    assert make_engine(model_path, "learner.kl.coefficient=0.1").reference_parameters() is None


def test_a_reference_that_stays_with_the_host_gives_the_same_update(model_path):
    overrides = ("learner.kl.coefficient=0.1", "learner.minibatch_size=4")
    engines = [make_engine(model_path, *overrides, *more) for more in ((), ("learner.kl.offload_reference=true",))]
    for engine in engines:
        engine.train(make_samples(), 0)
    assert largest_difference(*map(weights, engines)) == 0.0


def test_a_minibatch_beyond_the_mean_ratio_is_skipped(model_path):
    overrides = ("learner.epochs=4", "learner.optimizer.lr=0.05", "learner.loss.max_mean_ratio=1.0001")
    engine = make_engine(model_path, *overrides)
    metrics = engine.train(make_samples(advantage=1.0), 0)
    assert metrics["policy/skipped_minibatches"] == 3.0


def test_a_batch_without_loss_tokens_moves_nothing(model_path):
    engine = make_engine(model_path)
    before = weights(engine)
    metrics = engine.train([blank(sample) for sample in make_samples()], 0)
    assert metrics["policy/skipped_minibatches"] == 1.0
    assert largest_difference(weights(engine), before) == 0.0


def test_the_learning_rate_warms_up_and_falls(model_path):
    overrides = ("training.steps=6", "learner.optimizer.warmup_share=0.34", "learner.optimizer.schedule=linear")
    engine = make_engine(model_path, *overrides)
    rates = [engine.train(make_samples(2), step)["policy/lr"] for step in range(6)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize("overrides", [("learner.zero_stage=0",), ("learner.zero_stage=1", "model.dtype=bfloat16")])
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(model_path, tmp_path, overrides):
    overrides = (*overrides, "learner.optimizer.schedule=linear", "training.steps=4", "learner.minibatch_size=4")
    first = make_engine(model_path, *overrides)
    for step in range(2):
        first.train(make_samples(seed=step), step)
    save_checkpoint(first, tmp_path / "checkpoint")
    saved = weights(first)
    second = make_engine(model_path, *overrides)
    load_checkpoint(second, tmp_path / "checkpoint")
    assert largest_difference(weights(second), saved) == 0.0
    for step in range(2, 4):
        assert first.train(make_samples(seed=step), step) == second.train(make_samples(seed=step), step)
    assert largest_difference(weights(first), weights(second)) == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_transformers_with_equal_logprobs(tmp_path, tied):
    source = save_tiny_model(tmp_path / "source", tied=tied)
    engine = make_engine(source)
    engine.train(make_samples(), 0)
    export_model(engine, source, tmp_path / "final")
    assert (tmp_path / "final" / "tokenizer.json").read_text() == "{}"
    # What suits training must not slow down whoever generates with the export.
    assert json.loads((tmp_path / "final" / "config.json").read_text())["use_cache"]
    tokens = make_samples(1)[0].token_ids
    reloaded = make_engine(tmp_path / "final")
    assert reloaded.logprobs(tokens) == pytest.approx(engine.logprobs(tokens), abs=1e-6)
    assert ("lm_head.weight" in weights(engine)) is not tied


@pytest.mark.parametrize("whiten", ["batch", "minibatch"])
def test_whitened_advantages_ignore_shift_and_scale(model_path, whiten):
    engines = [make_engine(model_path, f"advantage.whiten={whiten}") for _ in range(2)]
    plain = make_samples()
    scaled = [
        replace(s, advantages=tuple(3 * a + 1 if m else 0.0 for a, m in zip(s.advantages, s.loss_mask, strict=True)))
        for s in plain
    ]
    for engine, samples in zip(engines, (plain, scaled), strict=True):
        engine.train(samples, 0)
    assert largest_difference(weights(engines[0]), weights(engines[1])) < 1e-6


def test_an_empty_batch_is_refused(model_path):
    with pytest.raises(ValueError, match="empty batch"):
        make_engine(model_path).train([], 0)


def test_an_offloaded_optimizer_gives_the_same_update(model_path):
    shared = ("learner.zero_stage=1", "learner.optimizer.eps=1e-4")
    kept, offloaded = (
        make_engine(model_path, *shared),
        make_engine(model_path, *shared, "learner.offload_optimizer=true"),
    )
    metrics = [engine.train(make_samples(), 0) for engine in (kept, offloaded)]
    assert metrics[0]["policy/grad_norm"] == pytest.approx(metrics[1]["policy/grad_norm"], rel=1e-6)
    assert largest_difference(weights(kept), weights(offloaded)) < 1e-6


def test_the_order_of_samples_and_of_the_batch_does_not_matter_beyond_rounding(model_path):
    engines = [make_engine(model_path, "learner.optimizer.eps=1e-4") for _ in range(3)]
    samples = make_samples()
    for engine, batch in zip(engines, (samples, samples, samples[::-1]), strict=True):
        engine.train(batch, 0)
    assert largest_difference(weights(engines[0]), weights(engines[1])) == 0.0
    assert largest_difference(weights(engines[0]), weights(engines[2])) < 1e-6


LORA = "learner.lora={rank: 4, alpha: 8}"


@pytest.mark.parametrize(
    "override", ["learner.epochs=1", "model.gradient_checkpointing=true", "learner.lora={rank: 2}"]
)
def test_shared_prefixes_change_no_update(model_path, override):
    samples = make_samples(12, seed=3)
    samples = [
        replace(s, token_ids=samples[i % 3].token_ids[:PROMPT] + s.token_ids[PROMPT:]) for i, s in enumerate(samples)
    ]
    updated = []
    for share in ("true", "false"):
        torch.manual_seed(0)  # adapters begin at random
        engine = make_engine(
            model_path, f"learner.share_prefixes={share}", override, "learner.minibatch_size=6", "rollout.group_size=12"
        )
        metrics = engine.train(samples, 0)
        updated.append((weights(engine), metrics))
    assert largest_difference(updated[0][0], updated[1][0]) < 1e-6
    assert updated[0][1] == pytest.approx(updated[1][1], rel=1e-4, abs=1e-6)


def test_adapters_train_alone_and_are_published_merged(model_path, tmp_path):
    engine = make_engine(model_path, LORA)
    before = weights(engine)
    assert largest_difference(before, weights(make_engine(model_path))) == 0.0
    engine.train(make_samples(), 0)
    engine.train(make_samples(), 1)
    after = weights(engine)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if name.endswith("proj.weight")}
    export_model(engine, model_path, tmp_path / "final")
    tokens = make_samples(1)[0].token_ids
    merged = make_engine(tmp_path / "final")
    assert merged.logprobs(tokens) == pytest.approx(engine.logprobs(tokens), abs=1e-5)
    assert merged.logprobs(tokens) != pytest.approx(make_engine(model_path).logprobs(tokens), abs=1e-3)


def test_only_the_named_modules_get_adapters(model_path):
    engine = make_engine(model_path, "learner.lora={rank: 2, target_modules: [q_proj]}")
    before = weights(engine)
    engine.train(make_samples(), 0)
    after = weights(engine)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {n for n in after if "q_proj" in n}


def test_with_adapters_the_reference_is_the_policy_without_them(model_path):
    adapted, whole = (make_engine(model_path, "learner.kl.coefficient=0.1", *of) for of in ((LORA,), ()))
    assert adapted.train(make_samples(), 0)["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    metrics = adapted.train(make_samples(), 1)
    initial = [whole.logprobs(sample.token_ids)[PROMPT - 1 :] for sample in make_samples()]
    assert metrics["policy/kl"] > 0
    table = adapted._reference_table(make_samples())
    assert table.rows(range(8)).tolist() == pytest.approx([value for row in initial for value in row], abs=1e-5)


def test_adapters_are_restored(model_path, tmp_path):
    first = make_engine(model_path, LORA)
    first.train(make_samples(), 0)
    save_checkpoint(first, tmp_path / "checkpoint")
    second = make_engine(model_path, LORA)
    load_checkpoint(second, tmp_path / "checkpoint")
    assert largest_difference(weights(first), weights(second)) == 0.0
    assert first.train(make_samples(), 1) == second.train(make_samples(), 1)
    assert largest_difference(weights(first), weights(second)) == 0.0


def test_many_microbatches_add_up_in_float32_though_the_policy_is_bfloat16(model_path):
    shared = ("model.dtype=bfloat16", "learner.optimizer.grad_clip=0")
    norms = [
        make_engine(model_path, *shared, f"learner.microbatch_tokens={tokens}").train(make_samples(64), 0)[
            "policy/grad_norm"
        ]
        for tokens in (16, 4096)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=3e-3)
