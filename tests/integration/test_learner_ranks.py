"""The learner's Ray actors: one rank and two give the same update, at every ZeRO stage."""

import random

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from learner.group import LearnerGroup
from ray_rl.config import resolve_config
from ray_rl.protocols import CollectedGroup
from ray_rl.types import (
    Completion,
    GroupCost,
    GroupSummary,
    Problem,
    Prompt,
    Reward,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)

pytestmark = pytest.mark.integration

VOCABULARY = 40
COST = GroupCost(
    primary_tokens=0, continuation_tokens=0, states=0, prefix_tokens=0, cached_prefix_tokens=0, seconds=0.0
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    if started:
        ray.shutdown()


def make_group(position, size=3):
    draw = random.Random(position)
    prompt = Prompt(
        problem=Problem(problem_id=f"p{position}", prompt="?", answer="!"),
        position=position,
        token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(4)),
    )
    trajectories = []
    for index in range(size):
        length = draw.randint(2, 14)
        completion = Completion(
            token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(length)),
            behavior_logprobs=(-3.0,) * length,
            versions=(VersionSpan(version=0, start=0, end=length),),
            finish_reason="stop",
        )
        reward = Reward(value=float(index == 0))
        trajectories.append(
            Trajectory(completion=completion, text="", reward=reward, boundaries=(0, length), values=())
        )
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), continuations=(), cost=COST)


def collected(position):
    group = make_group(position)
    summary = GroupSummary(
        prompt_id=group.prompt.prompt_id,
        position=position,
        oldest_version=0,
        newest_version=0,
        rewards=(1.0, 0.0, 0.0),
        lengths=tuple(len(t.completion.token_ids) for t in group.trajectories),
        truncated=0,
        failures=0,
        graded=3,
        segments=3,
        value_mean=float("nan"),
        value_stderr=float("nan"),
        cost=COST,
    )
    return CollectedGroup(prompt=group.prompt, ref=ray.put(group), summary=summary)


def make_config(ranks, stage):
    return resolve_config(
        {},
        [
            "advantage.kind=grpo",
            "values.kind=none",
            "rollout.group_size=3",
            "training.prompts_per_step=3",
            "learner.optimizer.lr=1e-3",
            # AdamW divides by the root of the second moment: without a floor, rounding noise of gradients that are nearly
            # zero would become whole steps of either sign.
            "learner.optimizer.eps=1e-4",
            "learner.kl.coefficient=0.05",
            f"learner.ranks={ranks}",
            f"learner.zero_stage={stage}",
            "learner.cpus_per_rank=0.5",
            # Minibatches of three sequences: the ranks get unequal shares, and the second one a microbatch of fillers only.
            "learner.minibatch_size=3",
            "learner.epochs=2",
            "learner.microbatch_size=1",
            "learner.start_timeout=240",
            "learner.step_timeout=240",
        ],
    )


async def trained(config, model_path, folder):
    """Metrics of two steps and the exported weights; leaves a checkpoint of the time between the steps."""
    batches = [[collected(3 * step + k) for k in range(3)] for step in range(2)]
    group = await LearnerGroup.start(config, str(model_path))
    try:
        first = await group.train(0, batches[0])
        await group.save(folder / "checkpoint")
        second = await group.train(1, batches[1])
        await group.export(folder / "final")
    finally:
        group.shutdown()
    policy = AutoModelForCausalLM.from_pretrained(folder / "final")
    return [first.metrics, second.metrics], policy.state_dict()


@pytest.fixture(scope="module")
async def one_rank(model_path, tmp_path_factory):
    return await trained(make_config(1, 0), model_path, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
async def two_ranks(request, model_path, tmp_path_factory):
    """Configuration, folder, metrics and policy at the ZeRO stage that the test asks for."""
    config, folder = make_config(2, request.param), tmp_path_factory.mktemp(f"stage{request.param}")
    return config, folder, *await trained(config, model_path, folder)


@pytest.mark.parametrize("two_ranks", [0, 1, 2, 3], indirect=True)
@pytest.mark.asyncio(loop_scope="module")
async def test_two_ranks_give_the_update_of_one(one_rank, two_ranks):
    _, _, metrics, policy = two_ranks
    expected_metrics, expected_policy = one_rank
    for name, tensor in expected_policy.items():
        assert (policy[name] - tensor).abs().max().item() < 1e-5, name
    for ours, expected in zip(metrics, expected_metrics, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("two_ranks", [3], indirect=True)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_new_group_goes_on_from_the_checkpoint_and_the_death_of_a_rank_is_an_error(model_path, two_ranks):
    config, folder, metrics, policy = two_ranks
    group = await LearnerGroup.start(config, str(model_path))
    batch = [collected(3 + k) for k in range(3)]
    try:
        await group.load(folder / "checkpoint")
        again = await group.train(1, batch)
        await group.export(folder / "again")
        ray.kill(group._actors[1])
        with pytest.raises(ray.exceptions.RayError):
            await group.train(2, batch)
    finally:
        group.shutdown()
    assert again.metrics == pytest.approx(metrics[1], rel=1e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "again").state_dict()
    assert all(torch.allclose(reloaded[name], policy[name], atol=1e-6) for name in policy)
