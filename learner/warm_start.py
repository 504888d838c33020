"""Makes the embedded policy: a tiny Llama, trained from nothing on demonstrations of the built-in task.

    python -m learner.warm_start ray_rl/embedded/policy

The demonstrations are of mixed quality (`ray_rl.tasks.arithmetic.demonstration`), so the policy ends up sure of its
facts and full of bad habits: what reinforcement learning then has to sort out. The result is a Hugging Face folder in
bfloat16 with a tokenizer of one token per character. The same arguments give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_rl.tasks.arithmetic import ALPHABET, DEFAULT_SLIP_SHARE, ArithmeticTask, demonstration, make_problem, verify
from ray_rl.types import Problem

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MAX_POSITIONS = 256
IGNORED = -100
"""The label of positions that don't train, as transformers has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartConfig:
    """What decides the weights."""

    steps: int = 1800
    """Optimizer steps."""
    tokens_per_step: int = 1024
    """Tokens of a batch, prompts included, about."""
    learning_rate: float = 2e-3
    """Peak of AdamW's; linear warm-up over the first twentieth, cosine decay to a hundredth."""
    max_chain: int = 8
    """Longest demonstrations, in steps of the chain; the shortest have one. Long ones come in over the first third."""
    slip_share: float = DEFAULT_SLIP_SHARE
    """Probability of a slip at each step of a demonstration."""
    seed: int = 0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task; byte-level without merges, so text and tokens always map one to one.

    Characters outside the task's alphabet become ``<unk>``.
    """
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [to_bytes.pre_tokenize_str(character)[0][0] for character in ALPHABET]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *symbols])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A random Llama of 1.0 M parameters in float32: 3 layers, width 160, 5 heads of 32, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def demonstration_batches(
    tokenizer: PreTrainedTokenizerFast, config: WarmStartConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (token_ids, labels), both int64 [B, L]; labels are IGNORED on the prompt.

    All demonstrations of a batch have chains of one length, hence the same number of tokens: nothing is padded.
    """
    rng = random.Random(f"warm start:{config.seed}")
    for step in count():
        # Facts come fastest from short chains, so the long ones wait.
        longest = min(config.max_chain, 2 + step * config.max_chain * 3 // config.steps)
        chain = rng.randint(1, longest)
        task = ArithmeticTask(min_steps=chain, max_steps=chain, eval_size=1)
        prompt_tokens, rows = 2 * chain + 3, []
        for _ in range(max(1, config.tokens_per_step // (8 * chain + 6))):
            problem = make_problem(task.draw(rng, "train"), "demonstration")
            rows.append(f"{problem.prompt}{demonstration(problem, rng, config.slip_share)}{EOS}")
        token_ids = torch.tensor(tokenizer(rows, add_special_tokens=False)["input_ids"])
        labels = token_ids.clone()
        labels[:, :prompt_tokens] = IGNORED
        yield token_ids, labels


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth of the steps, then a cosine down to 0.01."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: WarmStartConfig) -> float:
    """Learn demonstrations, in place; returns the loss of the last step (mean over completion tokens, nats)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config.steps))
    model.train()
    started, loss = time.monotonic(), torch.tensor(math.nan)
    batches = demonstration_batches(tokenizer, config)
    for step, (token_ids, labels) in zip(range(1, config.steps + 1), batches, strict=False):
        loss = model(input_ids=token_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{config.steps}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()
    return loss.item()


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], *, greedy: bool
) -> float:
    """Share of `problems` whose one completion verifies: the likeliest tokens, or sampled at temperature 1."""
    batch = tokenizer([str(problem.prompt) for problem in problems], return_tensors="pt", padding=True)
    prompt_tokens = batch["input_ids"].shape[1]
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        # Enough for any solution: six tokens a step, the answer and the end; the rest is room for detours.
        max_new_tokens=min(4 * prompt_tokens, MAX_POSITIONS - prompt_tokens),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, prompt_tokens:], skip_special_tokens=True)
    return sum(map(verify, texts, (problem.answer for problem in problems))) / len(problems)


@torch.no_grad()
def fact_certainty(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> torch.Tensor:
    """Probability of each right digit after ``=`` in the careful solutions of `problems`, 1-D, one entry per step."""
    certainties = []
    for problem in problems:
        text = f"{problem.prompt}{demonstration(problem, random.Random(0), slip_share=0)}"
        token_ids = torch.tensor([tokenizer(text)["input_ids"]])
        probabilities = model(input_ids=token_ids).logits[0].softmax(-1)
        at = torch.tensor([i for i, character in enumerate(text) if character == "="])
        certainties.append(probabilities[at, token_ids[0, at + 1]])
    return torch.cat(certainties)


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, eval_size: int) -> None:
    """Print what the policy can do on `eval_size` held-out problems of the task's default difficulty."""
    problems = ArithmeticTask(eval_size=eval_size).problems("eval")
    certainties = fact_certainty(model, tokenizer, problems)
    print(f"held-out problems          {len(problems)}")
    print(f"accuracy, sampled          {accuracy(model, tokenizer, problems, greedy=False):.3f}")
    print(f"accuracy, greedy           {accuracy(model, tokenizer, problems, greedy=True):.3f}")
    print(f"careful facts, mean        {certainties.mean().item():.4f}")
    print(f"careful facts, below 0.99  {(certainties < 0.99).float().mean().item():.4f}")


def make_policy(folder: Path, config: WarmStartConfig, eval_size: int = 1000) -> None:
    """Train the policy, report on it and save it to `folder` in the Hugging Face format (bfloat16 safetensors)."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, config)
    model = model.to(torch.bfloat16)
    # Judged as it will be loaded: float32 arithmetic on weights rounded to bfloat16.
    report(model.float(), tokenizer, eval_size)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` are the process's own unless given."""
    defaults = WarmStartConfig()
    parser = argparse.ArgumentParser(prog="python -m learner.warm_start", description="Make the embedded policy.")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--max-chain", type=int, default=defaults.max_chain)
    parser.add_argument("--slip-share", type=float, default=defaults.slip_share)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--eval-size", type=int, default=1000, help="held-out problems of the report")
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number rounds differently")
    options = vars(parser.parse_args(arguments))
    folder, eval_size = options.pop("folder"), options.pop("eval_size")
    torch.set_num_threads(options.pop("threads"))
    make_policy(folder, WarmStartConfig(**options), eval_size)


if __name__ == "__main__":
    main()
