"""A learner's engine in this process, and hand-made samples to train it on."""

import random
from dataclasses import replace

from learner.engine import LearnerEngine
from ray_rl.config import resolve_config
from ray_rl.types import TrainingSample
from tests.tiny_model import VOCABULARY

PROMPT = 4


def make_samples(count=8, seed=0, advantage=None):
    """Completions of 3 to 12 tokens; advantages alternate in sign unless one is given."""
    draw = random.Random(seed)
    samples = []
    for index in range(count):
        length = draw.randint(3, 12)
        value = (1.0 if index % 2 else -0.5) if advantage is None else advantage
        samples.append(
            TrainingSample(
                token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(PROMPT + length)),
                loss_mask=(False,) * PROMPT + (True,) * length,
                behavior_logprobs=(0.0,) * PROMPT + (-3.0,) * length,
                advantages=(0.0,) * PROMPT + (value,) * length,
                weights=(0.0,) * PROMPT + (1.0,) * length,
            )
        )
    return samples


def blank(sample):
    """The sample without loss tokens."""
    nothing = (0.0,) * len(sample.token_ids)
    return replace(
        sample,
        loss_mask=(False,) * len(nothing),
        behavior_logprobs=nothing,
        advantages=nothing,
        weights=nothing,
        confident_tokens=sample.loss_tokens,
    )


def with_continuations(completions=8, continuations=5):
    """Continuations start two tokens into a completion; weights differ from token to token."""
    draw = random.Random(1)
    samples = make_samples(completions)
    for sample in make_samples(continuations, seed=2):
        untrained = PROMPT + 2
        own = len(sample.token_ids) - untrained
        samples.append(
            replace(
                sample,
                loss_mask=(False,) * untrained + (True,) * own,
                behavior_logprobs=(0.0,) * untrained + (-3.0,) * own,
                advantages=(0.0,) * untrained + sample.advantages[untrained:],
                is_continuation=True,
            )
        )
    return [
        replace(sample, weights=tuple(draw.uniform(0.2, 2.0) if trains else 0.0 for trains in sample.loss_mask))
        for sample in samples
    ]


def make_engine(model_path, *overrides):
    ours = ["training.prompts_per_step=1", "learner.optimizer.lr=1e-3", "learner.microbatch_tokens=40"]
    return LearnerEngine(resolve_config({}, [*ours, *overrides]), model_path, 0, 1)


def weights(engine):
    sizes = iter(engine.parameter_bytes())
    found = {}
    for name, tensor in engine.named_parameters_gathered():
        assert tensor.nbytes == next(sizes)
        found[name] = tensor.clone()
    return found


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def completion_logprob(engine, sample):
    return sum(engine.logprobs(sample.token_ids)[PROMPT - 1 :])
