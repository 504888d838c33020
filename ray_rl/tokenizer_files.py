"""A model's tokenizer and the ids that end a completion, from its files or the hub, with as little imported as will do."""

from __future__ import annotations

import json
import os
from typing import Any

from ray_rl.wording import shown

GENERIC_MODELS = ("llama",)
"""Kinds of model for which AutoTokenizer believes a tokenizer_config.json that asks for no tokenizer class of a model's own."""


def read_tokenizer(path: str, *, trust_remote_code: bool, revision: str | None) -> Any:
    """As AutoTokenizer finds it; where tokenizer.json says it all, without the seconds that the import of that takes.

    Raises:
        Exception: whatever `tokenizers` and transformers stumble over.
    """
    if _is_generic(path):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer  # it imports torch

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)


def read_generation_eos(path: str, revision: str | None) -> int | list[int] | None:
    """What ends a completion by the generation config, a file that a model may lack.

    Raises:
        ValueError: it is no number, and no list of them; or the file is no JSON object.
        OSError: the file cannot be read.
    """
    found = _eos_of_folder(path) if os.path.isdir(path) else _eos_of_hub(path, revision)
    if found is None or isinstance(found, int):
        return found
    if isinstance(found, list) and all(isinstance(token_id, int) for token_id in found):
        return found
    raise ValueError(f"eos_token_id in generation_config.json must be a number or a list of them, not {shown(found)}")


def _is_generic(path: str) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    if not all(os.path.isfile(os.path.join(path, name)) for name in names):
        return False
    tokenizer, model = (_json(os.path.join(path, name)) for name in names[1:])
    named = tokenizer.get("tokenizer_class")
    return named == "TokenizersBackend" and "auto_map" not in tokenizer and model.get("model_type") in GENERIC_MODELS


def _eos_of_folder(path: str) -> Any:
    place = os.path.join(path, "generation_config.json")
    return _json(place).get("eos_token_id") if os.path.isfile(place) else None


def _eos_of_hub(name: str, revision: str | None) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except OSError:
        return None


def _json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if not isinstance(found, dict):
        raise ValueError(f"{os.path.basename(path)} is no JSON object")
    return found
