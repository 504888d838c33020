"""One rank and two give the same update at every ZeRO stage, and the learner's Ray actors do as the engine does."""

import pytest
import ray
from transformers import AutoModelForCausalLM

from learner.distributed import host_store, join_store
from learner.engine import LearnerEngine
from learner.group import LearnerGroup
from learner.samples import training_samples
from ray_rl import deadlines
from ray_rl.inventory import MANIFEST, manifest_text
from ray_rl.object_store import ObjectStore
from tests.integration.learner_runs import collected, make_config, make_group
from tests.tiny_model import save_tiny_model

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
        shapes = [(name, tensor.shape) for name, tensor in weights.items()]
        assert shapes == [(name, shape) for name, _, shape in engine.parameter_shapes()]
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


@pytest.mark.parametrize("is_stored", [False, True], ids=["in a folder", "in a store"])
async def test_a_new_group_goes_on_from_the_checkpoint(rank_processes, one_rank, model_path, tmp_path, is_stored):
    """ZeRO-3 on two ranks, where every tensor lies in pieces."""
    place = ObjectStore.of(f"file://{tmp_path}") if is_stored else tmp_path
    for rank in (rank for ranks in rank_processes.values() for rank in ranks):
        ray.kill(rank)
    config, batches = make_config(2, 3), [[collected(3 * step + k) for k in range(3)] for step in range(2)]
    group = await LearnerGroup.start(config, str(model_path), "test-ranks", may_grow=False)
    try:
        first = await group.train(0, batches[0])
        files = await group.save(place / "checkpoint")
        assert bool(files) == is_stored
    finally:
        group.shutdown()
    group = await LearnerGroup.start(config, str(model_path), "test-ranks", may_grow=False)
    try:
        if is_stored:
            listed = {f"checkpoint/{name}": entry for name, entry in files.items()}
            place.write(MANIFEST, manifest_text({}, listed).encode())
        await group.load(place / "checkpoint")
        second = await group.train(1, batches[1])
        await group.export(place / "final")
    finally:
        group.shutdown()
    expected_metrics, expected_weights = one_rank
    for stats, expected in zip((first, second), expected_metrics, strict=True):
        assert stats.metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, tensor in exported.named_parameters():
        assert abs(tensor.detach().numpy() - expected_weights[name]).max() < 1e-5, name
