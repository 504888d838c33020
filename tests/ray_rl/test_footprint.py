import json
from pathlib import Path

import pytest

from ray_rl.config import resolve_config
from ray_rl.embedded import policy_path
from ray_rl.footprint import GIB, Footprint, count_parameters, has_weights, hidden_size, is_on_hub, model_folder

MILLION = 10**6


def footprint(*overrides: str, **known) -> Footprint:
    return Footprint.of(resolve_config({}, overrides), parameters=MILLION, **known)


def write_safetensors(path: Path, shape: list[int]) -> None:
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def test_a_float32_rank_holds_weights_gradients_and_two_moments():
    assert footprint().rank_host == GIB + MILLION * (4 + 4 + 8)


def test_zero_shards_moments_then_gradients_then_weights():
    ranks = ("learner.ranks=4", "training.prompts_per_step=4")
    found = [footprint(*ranks, f"learner.zero_stage={stage}").rank_host - GIB for stage in range(4)]
    assert found == [MILLION * size for size in (16, 4 + 4 + 2, 4 + 1 + 2, 1 + 1 + 2)]


def test_a_16_bit_rank_holds_master_weights_too_and_offloading_moves_them_to_the_host():
    gpu = ("model.dtype=bfloat16", "learner.gpus_per_rank=1", "rollout.gpus_per_actor=1")
    assert footprint(*gpu).rank_device == MILLION * (2 + 4 + 12)
    offloaded = footprint(*gpu, "learner.zero_stage=1", "learner.offload_optimizer=true")
    assert (offloaded.rank_device, offloaded.rank_host) == (MILLION * 6, GIB + MILLION * 12)


def test_adapters_train_a_small_share():
    lora = footprint("learner.lora.rank=8", hidden_size=1000)
    assert lora.rank_host == GIB + MILLION * 4 + 16_000 * (4 + 8)


def test_a_reference_is_one_more_copy_of_the_weights():
    assert footprint("learner.kl.coefficient=0.1").rank_host - footprint().rank_host == MILLION * 4


def test_an_engine_on_cpu_holds_weights_and_cache():
    assert footprint("rollout.kv_cache_gib=2").engine_host == 3 * GIB + MILLION * 4


def test_one_machine_holds_all_of_it():
    config = resolve_config({})
    found = footprint()
    everything = GIB + found.rank_host + 3 * found.engine_host + found.weights
    assert found.on_one_machine(config, 3) == everything


def test_weights_that_go_through_nccl_need_no_shared_memory():
    gpu = ("rollout.gpus_per_actor=1", "learner.gpus_per_rank=1")
    config = resolve_config({}, (*gpu, "weights={kind: nccl}"))
    assert footprint(*gpu).weight_files(config) == 0


def test_the_embedded_policy_is_counted_from_its_header():
    assert count_parameters(policy_path()) == pytest.approx(1e6, rel=0.2)


def test_a_model_in_several_files_is_counted_by_its_index(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "model-of-another-kind.safetensors"):
        write_safetensors(tmp_path / name, [2, 3])
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert count_parameters(tmp_path) == 12


@pytest.mark.parametrize(
    "content", [b"", b"abc", (2).to_bytes(8, "little") + b"[]", (8).to_bytes(8, "little") + b'{"w": {}}']
)
def test_a_file_that_does_not_tell_is_not_counted(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert count_parameters(tmp_path) is None


def test_a_folder_without_safetensors_is_not_counted(tmp_path):
    assert count_parameters(tmp_path) is None


@pytest.mark.parametrize(("settings", "width"), [({"hidden_size": 64}, 64), ({"hidden_size": "64"}, None), ({}, None)])
def test_a_models_width_stands_in_its_settings(tmp_path, settings, width):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert hidden_size(tmp_path) == width


def test_weights_are_missing_until_every_file_that_the_index_names_is_there(tmp_path):
    assert not has_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    for name in ("a.safetensors", "b.safetensors"):
        assert not has_weights(tmp_path)
        (tmp_path / name).touch()
    assert has_weights(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"x": 1}}'])
def test_a_bad_index_is_not_told_of_as_missing_weights(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert has_weights(tmp_path)


def test_only_a_name_is_looked_for_on_the_hub(tmp_path):
    paths = ("embedded", str(tmp_path), "some/model")
    assert [is_on_hub(resolve_config({"model": {"path": path}})) for path in paths] == [False, False, True]


def test_a_model_of_the_hub_lies_in_its_cache_or_is_not_here(tmp_path, monkeypatch):
    folder = tmp_path / "models--some--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_folder(resolve_config({"model": {"path": "some/model"}})) == folder
    assert model_folder(resolve_config({"model": {"path": "some/other"}})) is None
