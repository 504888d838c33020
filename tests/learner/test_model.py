"""Packed, chunked log-probabilities against the plain way: one sequence at a time, all logits at once."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import learner.model
from learner.batches import pack_sequences, packed_batch
from learner.model import Policy, load_model, model_inputs, sharing_is_exact
from ray_rl.config.model import ModelConfig
from ray_rl.types import Microbatch
from tests.learner.engines import PROMPT, make_samples

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(params=["llama", "llama tied", "mistral with a window"])
def model_path(request, tmp_path):
    torch.manual_seed(0)
    if request.param.startswith("mistral"):
        model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=request.param.endswith("tied")))
    model.save_pretrained(tmp_path)
    return tmp_path


def plain(model, samples, temperature):
    """[N] log-probabilities and entropies of the loss tokens."""
    logprobs, entropies = [], []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.token_ids])).logits[0, :-1].float() / temperature
        distribution = logits.log_softmax(-1)
        targets = torch.tensor(sample.token_ids[1:])
        trains = torch.tensor(sample.loss_mask[1:])
        logprobs.append(distribution.gather(-1, targets.unsqueeze(-1)).squeeze(-1)[trains])
        entropies.append(-(distribution.exp() * distribution).sum(-1)[trains])
    return torch.cat(logprobs), torch.cat(entropies)


def gradients_of(model, weights, logprobs):
    (logprobs * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 200, 10_000])  # logits; 1, 5 and all positions at a time
@pytest.mark.parametrize(("attention", "recompute"), [("sdpa", True), ("eager", True), ("sdpa", False)])
def test_packed_and_chunked_is_exact_with_its_gradients(model_path, monkeypatch, chunk, attention, recompute):
    monkeypatch.setattr(learner.model, "_CHUNK_FLOATS", chunk)
    monkeypatch.setattr(learner.model, "_CHUNK_ROWS", 1)
    samples = make_samples(7)
    check_exact(
        samples, packed_batch(samples, Microbatch(indices=tuple(range(7))), CPU), model_path, attention, recompute
    )


def test_with_shared_prefixes_it_is_exact_too(model_path):
    samples = sorted(with_prefixes_in_common(), key=lambda sample: sample.token_ids)
    batch = packed_batch(samples, Microbatch(indices=tuple(range(len(samples)))), CPU, share=True)
    assert batch.sequences.input_ids.shape[1] < 0.7 * sum(len(sample.token_ids) for sample in samples)
    check_exact(samples, batch, model_path, "sdpa", True)


def test_a_model_whose_layers_look_at_neighbours_shares_no_prefix(tmp_path):
    torch.manual_seed(0)
    convolving = Lfm2ForCausalLM(Lfm2Config(**SHAPE, initializer_range=0.5, layer_types=["conv", "full_attention"]))
    convolving.save_pretrained(tmp_path / "convolving")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "attending")
    exact = {path.name: sharing_is_exact(load_model(ModelConfig(), path)) for path in tmp_path.iterdir()}
    assert exact == {"convolving": False, "attending": True}


def with_prefixes_in_common():
    """Two prompts; completions of them, one of them twice, and continuations from within these."""
    samples = []
    for of_prompt in (make_samples(4, seed=5), make_samples(3, seed=6)):
        prompt = of_prompt[0].token_ids[:PROMPT]
        completions = [replace(sample, token_ids=prompt + sample.token_ids[PROMPT:]) for sample in of_prompt]
        samples += [*completions, completions[0]]
        for sample in completions:
            after_two = PROMPT + 2
            masked = (False,) * 2 + sample.loss_mask[PROMPT + 2 :]
            tokens = sample.token_ids[:after_two] + tuple(reversed(sample.token_ids[after_two:]))
            samples.append(replace(sample, token_ids=tokens, loss_mask=(False,) * PROMPT + masked))
    return samples


def check_exact(samples, batch, model_path, attention, recompute):
    ours = load_model(ModelConfig(attention=attention), model_path)
    logprobs, entropies = Policy(ours, recompute_head=recompute)(batch.sequences, batch.predicting, batch.targets, 0.7)
    theirs = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    expected, expected_entropies = plain(theirs, samples, 0.7)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, expected_entropies.detach(), atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 1, len(expected))
    found, wanted = gradients_of(ours, weights, logprobs), gradients_of(theirs, weights, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_no_logits_of_the_whole_row_are_kept(model_path, monkeypatch):
    """Of all tensors that the backward pass holds on to, none has the vocabulary's width."""
    monkeypatch.setattr(learner.model, "_CHUNK_FLOATS", 40 * 4)
    monkeypatch.setattr(learner.model, "_CHUNK_ROWS", 1)
    samples = make_samples(7)
    batch = packed_batch(samples, Microbatch(indices=tuple(range(7))), CPU)
    policy, kept = Policy(load_model(ModelConfig(), model_path)), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        policy(batch.sequences, batch.predicting, batch.targets, 1.0)
    assert len(batch.targets) > 4
    assert not [shape for shape in kept if shape[-1:] == (40,) and shape[0] != 32]


def test_logits_of_a_16_bit_model_are_computed_in_float32(model_path):
    samples = make_samples(3)
    batch = packed_batch(samples, Microbatch(indices=(0, 1, 2)), CPU)
    found = {}
    with torch.no_grad():
        for name, options in {"float32": {}, "rounded": {"float32_head": False}}.items():
            policy = Policy(load_model(ModelConfig(dtype="bfloat16"), model_path), **options)
            found[name], _ = policy(batch.sequences, batch.predicting, batch.targets, 1.0)
        model = load_model(ModelConfig(dtype="bfloat16"), model_path)
        hidden = model.base_model(**model_inputs(batch.sequences)).last_hidden_state[0, batch.predicting]
        logits = hidden.double() @ model.get_output_embeddings().weight.double().T
        exact = logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    error = {name: (logprobs - exact).abs().max().item() for name, logprobs in found.items()}
    assert error["float32"] < 1e-5 < error["rounded"]


def test_logits_that_are_capped_behind_the_head_are_those_of_the_model(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=None)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    samples = make_samples(3)
    batch = packed_batch(samples, Microbatch(indices=(0, 1, 2)), CPU)
    with torch.no_grad():
        logprobs, _ = Policy(load_model(ModelConfig(), tmp_path))(batch.sequences, batch.predicting, batch.targets, 1.0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        expected, _ = plain(model, samples, 1.0)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert logprobs.std() > 0.01


def test_a_model_that_caps_its_attention_says_what_to_use(tmp_path):
    config = Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=5.0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    policy = Policy(load_model(ModelConfig(), tmp_path))
    batch = packed_batch(make_samples(1), Microbatch(indices=(0,)), CPU)
    with pytest.raises(NotImplementedError, match=r"model\.attention=eager"):
        policy(batch.sequences, batch.predicting, batch.targets, 1.0)


def test_a_batch_without_loss_tokens_has_a_gradient_of_zero(model_path):
    """Under ZeRO-3 a rank without samples still takes part in every collective of the others."""
    batch = packed_batch([], Microbatch(indices=()), CPU)
    model = load_model(ModelConfig(), model_path)
    logprobs, _ = Policy(model)(batch.sequences, batch.predicting, batch.targets, 1.0)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_sequences_keep_apart_and_start_at_position_0():
    sequences = pack_sequences([(5, 6, 7), (8,), (9, 10)], CPU)
    assert sequences.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (sequences.starts.tolist(), sequences.longest) == ([0, 3, 4, 6], 3)
    assert sequences.places.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert sequences.owned.tolist() == [0, 1, 2, 3, 6, 7]
    assert sequences.shared == ()


def test_a_shared_prefix_is_in_the_row_once():
    rows = [(5, 6), (5, 6, 7), (5, 6, 8, 9), (5, 6, 8, 9), (5, 6, 8, 4), (3,)]
    sequences = pack_sequences(rows, CPU, share=True)
    assert sequences.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 2, 3, 3, 0]]
    assert [
        [sequences.input_ids[0, place] for place in path[: len(row)]]
        for path, row in zip(sequences.places.tolist(), rows, strict=True)
    ] == [list(row) for row in rows]
    assert sequences.places.flatten()[sequences.owned].tolist() == list(range(7))
    # Row four lies in it as the prompt and as what follows it from place 3 on, row five too, but for its last token.
    assert sequences.shared == ((0, 4, 2), (0, 8, 2), (0, 12, 2), (3, 14, 2), (0, 16, 2), (3, 18, 1))
