"""What a run executes: its own code, and what the user names as such. Never what lies in a model's folder."""

import ast
import os
from pathlib import Path

import pytest
import torch

from learner.model import load_model
from ray_rl.config.model import ModelConfig
from ray_rl.errors import ConfigError
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
UNPICKLERS = {"load", "loads", "Unpickler", "read_pickle"}
PICKLING = {"pickle", "cloudpickle", "dill", "joblib", "torch", "numpy", "np", "pandas", "pd", "marshal", "shelve"}
ALLOWED = {"actors/grader_process.py"}
"""A grader's process unpickles what the run sends to it. Nothing pickled comes back (actors/verdicts.py)."""


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def unpicklers(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in UNPICKLERS:
            module = node.func.value
            if isinstance(module, ast.Name) and module.id in PICKLING:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module in PICKLING:
            yield from (f"from {node.module} import {name.name}" for name in node.names if name.name in UNPICKLERS)


def test_only_the_process_of_a_grader_unpickles():
    files = [path for package in ("ray_rl", "actors", "learner") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if any(unpicklers(path.read_text()))}
    assert found == ALLOWED


@pytest.mark.parametrize("source", ["torch.load(file)", "x = pickle.loads(data)", "from pickle import loads"])
def test_the_search_finds_what_unpickles(source):
    assert list(unpicklers(source))


def test_weights_in_a_pickle_are_read_without_running_it(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    for weights in Path(folder).glob("*.safetensors"):
        weights.unlink()
    marker = tmp_path / "it ran"
    torch.save({"model.embed_tokens.weight": Runs(marker)}, Path(folder) / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^model\.path: .* is not loadable"):
        load_model(ModelConfig(path=str(folder)), folder, trainable=False)
    assert not marker.exists()
    torch.load(Path(folder) / "pytorch_model.bin", weights_only=False)  # so it would have
    assert marker.exists()
