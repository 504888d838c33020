"""TRL's GRPOTrainer on the run that a recipe describes: `python -m benchmarks.trl_side RECIPE OVERRIDE...`.

Needs `trl` (benchmarks.versus_trl tells which). Prints one line of JSON: seconds and mean reward of every step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from ray_rl.config import RunConfig, load_config

if TYPE_CHECKING:
    from trl import GRPOConfig


def train(config: RunConfig, output: str) -> dict[str, list[float]]:
    """Train a GRPO recipe with TRL: same prompts, same reward, same loss, generation by transformers.

    Args:
        config: advantage `grpo`, the loss `ppo` with `token_mean`, one optimizer step per batch.
        output: a folder, which TRL insists on.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from actors.rewards import make_verifier
    from ray_rl.launch import Prepared, model_source
    from ray_rl.types import ScoringItem

    rollout = config.rollout
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = model_source(config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    stream = Prepared(config, evaluates=False).stream
    prompts = [stream.next() for _ in range(config.training.steps * config.training.prompts_per_step)]
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    if [tuple(tokenizer(text)["input_ids"]) for text in texts] != [prompt.token_ids for prompt in prompts]:
        raise AssertionError("TRL would see other prompts: text and tokens do not determine each other")
    verify = make_verifier(config.reward)
    rewards: list[float] = []
    seconds: list[float] = []

    def score(completions: list[str], completion_ids: list[list[int]], position: list[int], **_: object) -> list[float]:
        values = []
        for text, ids, index in zip(completions, completion_ids, position, strict=True):
            finished = len(ids) < rollout.max_tokens or ids[-1] == tokenizer.eos_token_id
            item = ScoringItem(problem=prompts[index].problem, completion_text=text)
            values.append(verify(item).value if finished else config.reward.unfinished)
        rewards.append(sum(values) / len(values))
        return values

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        reward_funcs=score,
        args=_grpo_config(config, output),
        train_dataset=Dataset.from_list(
            [{"prompt": text, "position": index} for index, text in enumerate(texts)],
        ),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"seconds": seconds, "rewards": rewards}


def _grpo_config(config: RunConfig, output: str) -> GRPOConfig:
    """A recipe in TRL's words; a microbatch is a group."""
    from trl import GRPOConfig

    rollout, learner, optimizer = config.rollout, config.learner, config.learner.optimizer
    return GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=config.seed,
        max_steps=config.training.steps,
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_tokens,
        temperature=rollout.temperature,
        per_device_train_batch_size=rollout.group_size,
        gradient_accumulation_steps=config.training.prompts_per_step,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.grad_clip,
        loss_type="dapo",
        epsilon=learner.loss.clip_low,
        epsilon_high=learner.loss.clip_high,
        beta=0.0,
        scale_rewards="group",
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(load_config(sys.argv[1], sys.argv[2:]), folder)))
