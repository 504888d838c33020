"""One rank and two give the same update at every ZeRO stage, and the learner's Ray actors do as the engine does."""

import random

import pytest
import ray
from transformers import AutoModelForCausalLM

from learner.distributed import host_store, join_store
from learner.engine import LearnerEngine
from learner.group import LearnerGroup
from learner.samples import training_samples
from ray_rl import deadlines
from ray_rl.config import resolve_config
from ray_rl.protocols import CollectedGroup
from ray_rl.types import (
    NO_COST,
    Completion,
    GroupSummary,
    Problem,
    Prompt,
    Reward,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)
from tests.tiny_model import VOCABULARY, save_tiny_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


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
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), continuations=(), cost=NO_COST)


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
        cost=NO_COST,
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
            "learner.microbatch_tokens=16",
            "learner.start_timeout=240",
            "learner.step_timeout=240",
        ],
    )


@ray.remote(num_cpus=0.5, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}})
class Rank:
    """Runs engines of one configuration after another, so that the imports are paid for once."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.store = rank, world_size, None

    def host(self):
        self.store = self.store or host_store(self.world_size)
        return self.store.port

    def run(self, port, config, model_path, batches):
        self.store = self.store or join_store("127.0.0.1", port, self.world_size)
        engine = LearnerEngine(config, model_path, self.rank, self.world_size, self.store)
        metrics = [engine.train(samples, step) for step, samples in enumerate(batches)]
        weights = {name: tensor.clone().numpy() for name, tensor in engine.named_parameters_gathered()}
        assert [tensor.nbytes for tensor in weights.values()] == engine.parameter_bytes()
        return metrics, weights


@pytest.fixture(scope="module")
def rank_processes():
    return {world_size: [Rank.remote(rank, world_size) for rank in range(world_size)] for world_size in (1, 2)}


def run_everywhere(ranks, config, model_path):
    """Metrics of two steps and the weights after them, by rank."""
    batches = [
        [sample for k in range(3) for sample in training_samples(make_group(3 * step + k), config)] for step in range(2)
    ]
    port = deadlines.get(ranks[0].host.remote(), 120, what="a rank")
    runs = [rank.run.remote(port, config, str(model_path), batches) for rank in ranks]
    return deadlines.get(runs, 240, what="the ranks")


@pytest.fixture(scope="module")
def one_rank(rank_processes, model_path):
    (outcome,) = run_everywhere(rank_processes[1], make_config(1, 0), model_path)
    return outcome


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_give_the_update_of_one(rank_processes, one_rank, model_path, stage):
    expected_metrics, expected_weights = one_rank
    for metrics, weights in run_everywhere(rank_processes[2], make_config(2, stage), model_path):
        assert weights.keys() == expected_weights.keys()
        for name, tensor in weights.items():
            assert abs(tensor - expected_weights[name]).max() < 1e-5, name
        for ours, expected in zip(metrics, expected_metrics, strict=True):
            assert ours == pytest.approx(expected, rel=1e-3, abs=1e-6)


async def test_a_new_group_goes_on_from_the_checkpoint_and_the_death_of_a_rank_is_an_error(
    rank_processes, one_rank, model_path, tmp_path
):
    """ZeRO-3 on two ranks, where every tensor lies in pieces."""
    for rank in (rank for ranks in rank_processes.values() for rank in ranks):
        ray.kill(rank)
    config, batches = make_config(2, 3), [[collected(3 * step + k) for k in range(3)] for step in range(2)]
    group = await LearnerGroup.start(config, str(model_path))
    try:
        first = await group.train(0, batches[0])
        await group.save(tmp_path / "checkpoint")
    finally:
        group.shutdown()
    group = await LearnerGroup.start(config, str(model_path))
    try:
        await group.load(tmp_path / "checkpoint")
        second = await group.train(1, batches[1])
        await group.export(tmp_path / "final")
        ray.kill(group._actors[1])
        with pytest.raises(ray.exceptions.RayError):
            await group.train(2, batches[1])
    finally:
        group.shutdown()
    expected_metrics, expected_weights = one_rank
    for stats, expected in zip((first, second), expected_metrics, strict=True):
        assert stats.metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, tensor in exported.named_parameters():
        assert abs(tensor.detach().numpy() - expected_weights[name]).max() < 1e-5, name
