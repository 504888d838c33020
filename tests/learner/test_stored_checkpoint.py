"""A learner's checkpoint in a store: the same state comes back, or one line. One rank; tests/integration has two."""

import json
import tempfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from learner.checkpoint import CheckpointError, CheckpointNotWritten
from learner.stored_checkpoint import load_stored_checkpoint, store_checkpoint, store_model
from ray_rl.inventory import MANIFEST, manifest_text
from ray_rl.object_store import ObjectStore
from tests.faulty_store import empty_store, failing
from tests.learner.engines import largest_difference, make_engine, make_samples, weights
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where ranks keep what is on its way; nothing may be left there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def trained(model_path: Path, *overrides: str):
    engine = make_engine(model_path, *overrides)
    engine.train(make_samples(), 0)
    return engine


def stored(engine, step: ObjectStore) -> None:
    entries = store_checkpoint(engine, step / "learner")
    assert entries == {name: (step / "learner").entry(name) for name in (step / "learner").sizes()}
    step.write(MANIFEST, manifest_text({}, {f"learner/{name}": entry for name, entry in entries.items()}).encode())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_same_state_comes_back(model_path, stage):
    engine, step = trained(model_path, f"learner.zero_stage={stage}"), empty_store()
    stored(engine, step)
    restored = make_engine(model_path, f"learner.zero_stage={stage}")
    load_stored_checkpoint(restored, step / "learner")
    assert largest_difference(weights(engine), weights(restored)) == 0.0
    for one in (engine, restored):
        one.train(make_samples(seed=1), 1)
    assert largest_difference(weights(engine), weights(restored)) == 0.0


def test_the_policy_is_that_of_the_learner(model_path, tmp_path):
    engine, store = trained(model_path), empty_store()
    for name in store_model(engine, model_path, store):
        store.fetch(name, tmp_path / "policy" / name)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    exported = dict(policy.named_parameters())
    assert all((exported[name] - tensor).abs().max() < 1e-2 for name, tensor in weights(engine).items())


def test_a_store_that_refuses_is_one_line_and_the_learner_goes_on(model_path):
    engine, store = trained(model_path), empty_store()
    with (
        failing(1),
        pytest.raises(CheckpointNotWritten, match=r"^faulty://bucket/run/\S+: could not be written: .*today"),
    ):
        store_checkpoint(engine, store)
    engine.train(make_samples(seed=1), 1)
    stored(engine, store / "step_1")


@pytest.mark.parametrize(
    ("accident", "fault"),
    [
        (lambda step, name: step.write(name, b"else"), "is not what was written"),
        (lambda step, name: step.delete(name), r"run/learner: faulty://bucket/run/learner/learner/\S+"),
        (lambda step, name: step.delete(MANIFEST), MANIFEST),
        (
            lambda step, name: step.write(MANIFEST, json.dumps({"files": {}, "xxh3": "0"}).encode()),
            "not what was written",
        ),
    ],
)
def test_what_is_damaged_is_not_loaded(model_path, accident, fault):
    engine, step = trained(model_path), empty_store()
    stored(engine, step)
    accident(step, "learner/learner/mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=fault) as caught:
        load_stored_checkpoint(make_engine(model_path), step / "learner")
    assert "\n" not in str(caught.value)
