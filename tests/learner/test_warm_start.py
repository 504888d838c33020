"""The embedded policy: the program that makes it, and the one that ships."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from learner import warm_start  # noqa: E402
from learner.warm_start import IGNORED, WarmStartConfig  # noqa: E402
from ray_rl.embedded import policy_path  # noqa: E402
from ray_rl.tasks.arithmetic import ALPHABET, ArithmeticTask, demonstration, parse, split_of, verify  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Equal results whatever ran before; and models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy after three steps of warm start."""
    folder = tmp_path_factory.mktemp("policy")
    warm_start.main([str(folder), "--steps", "3", "--max-chain", "3", "--eval-size", "4"])
    return folder


@pytest.fixture(scope="module")
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.mark.parametrize("which", ["made", "shipped"])
def test_the_folder_loads_as_any_hugging_face_model_does(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("made") if which == "made" else policy_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert 900_000 < model.num_parameters() < 3_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template is None
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 4_000_000


@given(st.integers(), st.integers(1, 12), st.floats(0, 1))
def test_the_tokenizer_maps_all_task_text_one_to_one(
    shipped_tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, slip_share: float
) -> None:
    problem = ArithmeticTask(min_steps=steps, max_steps=steps, eval_size=1, seed=seed).problems("train")[0]
    text = f"{problem.prompt}{demonstration(problem, random.Random(seed), slip_share)}"
    token_ids = shipped_tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert shipped_tokenizer.unk_token_id not in token_ids
    assert shipped_tokenizer.decode(token_ids) == text


@given(st.text(ALPHABET))
def test_the_tokenizer_maps_any_text_in_its_alphabet_one_to_one(
    shipped_tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    token_ids = shipped_tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert shipped_tokenizer.decode(token_ids) == text


def test_the_tokenizer_shows_what_it_does_not_know(shipped_tokenizer: PreTrainedTokenizerBase) -> None:
    assert shipped_tokenizer.unk_token_id in shipped_tokenizer("3/4")["input_ids"]


def test_the_program_builds_the_shipped_tokenizer(shipped_tokenizer: PreTrainedTokenizerBase) -> None:
    assert warm_start.build_tokenizer().get_vocab() == shipped_tokenizer.get_vocab()


def test_only_completions_train_and_held_out_problems_never_do() -> None:
    tokenizer = warm_start.build_tokenizer()
    batches = warm_start.demonstration_batches(tokenizer, WarmStartConfig(steps=30, tokens_per_step=200))
    for _, (token_ids, labels) in zip(range(30), batches, strict=False):
        for row, row_labels in zip(token_ids, labels, strict=True):
            trained = row_labels != IGNORED
            prompt, completion = tokenizer.decode(row[~trained]), tokenizer.decode(row[trained])
            assert prompt.endswith(":\n")
            parse(prompt.removesuffix(":\n"))
            assert split_of(prompt.removesuffix(":\n")) == "train"
            assert completion.endswith("<eos>")
            assert torch.equal(row_labels[trained], row[trained])


def test_the_same_seed_makes_the_same_weights() -> None:
    tokenizer = warm_start.build_tokenizer()
    weights = []
    for seed in (0, 0, 1):
        config = WarmStartConfig(steps=2, tokens_per_step=100, seed=seed)
        model = warm_start.build_model(tokenizer, seed)
        warm_start.train(model, tokenizer, config)
        weights.append(model.lm_head.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_few_dozen_steps_teach_the_form() -> None:
    tokenizer = warm_start.build_tokenizer()
    config = WarmStartConfig(steps=40, tokens_per_step=256, max_chain=2)
    model = warm_start.build_model(tokenizer, config.seed)
    # Untrained it is near log(26) = 3.26.
    assert warm_start.train(model, tokenizer, config) < 2.0


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [warm_start.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.01)
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_the_shipped_policy_is_sure_of_its_facts_and_full_of_bad_habits() -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    problems = ArithmeticTask(eval_size=200).problems("eval")
    certainties = warm_start.fact_certainty(model, tokenizer, problems)
    assert certainties.mean() > 0.99
    torch.manual_seed(0)
    # Room to learn: 200 problems have a standard error of 0.03.
    assert 0.08 < warm_start.accuracy(model, tokenizer, problems, greedy=False) < 0.35
    assert warm_start.accuracy(model, tokenizer, problems, greedy=True) < 0.3


def test_accuracy_counts_what_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    problems = ArithmeticTask(eval_size=8).problems("eval")
    seen: list[tuple[str, str]] = []

    def spy(text: str, answer: str) -> float:
        seen.append((text, answer))
        return verify(text, answer)

    monkeypatch.setattr(warm_start, "verify", spy)
    share = warm_start.accuracy(model, tokenizer, problems, greedy=True)
    assert [answer for _, answer in seen] == [problem.answer for problem in problems]
    assert share == sum(verify(text, answer) for text, answer in seen) / 8
    for (text, _), problem in zip(seen, problems, strict=True):
        assert text.startswith(str(problem.prompt)[:3])
        assert text.count("\n") == problem.metadata["steps"]
