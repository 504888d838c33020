import json
import shutil
import subprocess
import sys

import pytest

from ray_rl.embedded import policy_path
from ray_rl.tokenizer_files import GENERIC_MODELS, read_generation_eos, read_tokenizer

CODE = """
import sys
from ray_rl.tokenizer import load_tokenizer
load_tokenizer(sys.argv[1]).check_ends()
print("torch" in sys.modules)
"""


def test_the_embedded_policy_s_tokenizer_is_read_without_torch():
    command = [sys.executable, "-c", CODE, str(policy_path())]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"


def test_it_is_the_one_that_transformers_would_choose():
    from transformers import AutoTokenizer

    path = str(policy_path())
    ours, theirs = read_tokenizer(path, trust_remote_code=False, revision=None), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


def test_transformers_believes_the_files_of_the_generic_models():
    from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    assert not set(GENERIC_MODELS) & MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "x.Y"]}}),
        ("config.json", {"model_type": "qwen2"}),
    ],
)
def test_what_asks_for_a_class_of_its_own_is_left_to_transformers(file, changes, tmp_path, monkeypatch):
    import transformers

    shutil.copytree(policy_path(), tmp_path / "model")
    place = tmp_path / "model" / file
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    asked = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **options: asked.append(path))
    read_tokenizer(str(tmp_path / "model"), trust_remote_code=False, revision=None)
    assert asked == [str(tmp_path / "model")]


def test_a_folder_without_a_generation_config_names_no_end(tmp_path):
    assert read_generation_eos(str(tmp_path), None) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert read_generation_eos(str(tmp_path), None) == [7, 1]
