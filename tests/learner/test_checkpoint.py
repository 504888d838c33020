"""What a full disk and damaged files do to checkpoints and exports: one clear line, and nothing half done. One rank."""

import resource
import shutil
from collections import namedtuple
from contextlib import contextmanager

import pytest

from learner.checkpoint import (
    TAG,
    CheckpointError,
    CheckpointNotWritten,
    export_model,
    load_checkpoint,
    save_checkpoint,
)
from ray_rl.errors import NotWritten
from tests.learner.engines import largest_difference, make_engine, make_samples, weights
from tests.tiny_model import save_tiny_model

STAGES = [(), ("learner.zero_stage=1",), ("learner.zero_stage=3",)]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


def trained(model_path, *overrides):
    engine = make_engine(model_path, *overrides)
    engine.train(make_samples(), 0)
    return engine


@contextmanager
def files_of_at_most(size):
    """The system refuses what makes a file longer, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overrides", STAGES)
def test_a_full_disk_is_one_line_and_the_learner_goes_on(model_path, tmp_path, overrides):
    engine = trained(model_path, *overrides)
    with files_of_at_most(50_000), pytest.raises(CheckpointNotWritten) as caught:
        save_checkpoint(engine, tmp_path / "full")
    assert isinstance(caught.value, NotWritten)
    assert str(caught.value).startswith(f"{tmp_path / 'full'}: could not be written: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    engine.train(make_samples(seed=1), 1)
    save_checkpoint(engine, tmp_path / "checkpoint")
    restored = make_engine(model_path, *overrides)
    load_checkpoint(restored, tmp_path / "checkpoint")
    assert largest_difference(weights(engine), weights(restored)) == 0.0


def test_who_may_read_an_exports_configuration_may_read_its_weights(model_path, tmp_path):
    export_model(trained(model_path), model_path, tmp_path / "final")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "final").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_an_export_onto_a_full_disk_is_one_line_too(model_path, tmp_path):
    engine = trained(model_path)
    with files_of_at_most(20_000), pytest.raises(CheckpointNotWritten, match=r"^.*final: could not be written: .*$"):
        export_model(engine, model_path, tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_clearly_too_small_is_not_written_to(model_path, tmp_path, monkeypatch):
    engine = trained(model_path)
    monkeypatch.setattr(engine.deepspeed, "save_checkpoint", lambda *args, **kwargs: pytest.fail("it was tried"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1000))
    with pytest.raises(CheckpointNotWritten, match=r"it takes more than .* GiB, and .* GiB are free; make room"):
        save_checkpoint(engine, tmp_path / "checkpoint")
    with pytest.raises(CheckpointNotWritten, match="it takes more than"):
        export_model(engine, model_path, tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_takes_more_than_what_is_asked_of_the_disk(model_path, tmp_path, monkeypatch):
    engine = trained(model_path)
    save_checkpoint(engine, tmp_path / "checkpoint")
    size = sum(map(len, content(tmp_path / "checkpoint").values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, size))
    save_checkpoint(engine, tmp_path / "again")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, size // 2))
    with pytest.raises(CheckpointNotWritten):
        save_checkpoint(engine, tmp_path / "third")


def test_a_write_that_fails_leaves_the_older_folder(model_path, tmp_path):
    engine = trained(model_path)
    save_checkpoint(engine, tmp_path / "checkpoint")
    kept = content(tmp_path / "checkpoint")
    engine.train(make_samples(seed=1), 1)
    with files_of_at_most(50_000), pytest.raises(CheckpointNotWritten):
        save_checkpoint(engine, tmp_path / "checkpoint")
    assert content(tmp_path / "checkpoint") == kept
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_missing_checkpoint_is_named(model_path, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint of a learner here"):
        load_checkpoint(make_engine(model_path), tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def overwrite(path):
    path.write_bytes(bytes(range(256)) * 10)


@pytest.mark.parametrize("overrides", STAGES)
@pytest.mark.parametrize("damage", [cut, empty, overwrite])
def test_a_damaged_file_is_named_and_another_checkpoint_can_be_loaded_then(model_path, tmp_path, overrides, damage):
    engine = trained(model_path, *overrides)
    save_checkpoint(engine, tmp_path / "whole")
    for file in (tmp_path / "whole" / TAG).glob("*.pt"):
        shutil.copytree(tmp_path / "whole", tmp_path / file.stem)
        damage(tmp_path / file.stem / TAG / file.name)
        restored = make_engine(model_path, *overrides)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(restored, tmp_path / file.stem)
        assert str(caught.value).startswith(f"{tmp_path / file.stem}: {file.name} is damaged or missing: ")
        assert "\n" not in str(caught.value)
        load_checkpoint(restored, tmp_path / "whole")
        assert largest_difference(weights(engine), weights(restored)) == 0.0


def test_a_missing_file_is_named(model_path, tmp_path):
    save_checkpoint(trained(model_path), tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint" / TAG).glob("*.pt")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged or missing: FileNotFoundError"):
        load_checkpoint(make_engine(model_path), tmp_path / "checkpoint")


def test_a_checkpoint_of_another_model_does_not_fit(model_path, tmp_path):
    save_checkpoint(trained(save_tiny_model(tmp_path / "untied", tied=False)), tmp_path / "checkpoint")
    adapted = make_engine(model_path, "learner.lora={rank: 2}")
    with pytest.raises(CheckpointError, match=r"^.*checkpoint: it does not fit this learner: RuntimeError: .*$"):
        load_checkpoint(adapted, tmp_path / "checkpoint")
