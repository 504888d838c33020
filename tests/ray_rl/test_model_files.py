"""A model's folder before anything is loaded: whole, or one line that says what is missing."""

import json
import shutil
from pathlib import Path

import pytest

from ray_rl.config import ConfigError
from ray_rl.embedded import policy_path
from ray_rl.model_files import check_model_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(policy_path(), tmp_path / "policy"))


def fault(folder: Path) -> str:
    with pytest.raises(ConfigError, match=r"^model\.path: .+; .+") as error:
        check_model_folder(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def shard(folder: Path) -> None:
    """Under the name of one shard of two, of which the other isn't there."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_model_and_a_name_on_the_hub_pass(folder):
    check_model_folder(str(folder))
    check_model_folder("owner/name")
    shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    check_model_folder(str(folder))


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01, 0.0])
def test_weights_that_were_cut_off_are_told(folder, share):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert ("was cut off: it has" in fault(folder)) == (share > 0.0)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        b"{}",
        (2**62).to_bytes(8, "little"),
        b"\2\0\0\0\0\0\0\0{}",
        b"\2\0\0\0\0\0\0\0[]",
        b"\1\0\0\0\0\0\0\0{",
    ],
)
def test_weights_that_are_none_are_told(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "is not a safetensors file with weights" in fault(folder)


def test_missing_weights_and_shards_are_told(folder):
    shard(folder)
    assert "lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json names" in fault(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "has no weight_map" in fault(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "has no weights (model.safetensors or its index)" in fault(folder)
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is empty" in fault(folder)


@pytest.mark.parametrize("content", ["", "null", "[]", "{", "{}", '{"model_type": 3}', "[" * 5000, "\0"])
def test_a_config_that_is_none_is_told(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in fault(folder)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert "has no config.json; give a folder in Hugging Face format" in fault(tmp_path)
