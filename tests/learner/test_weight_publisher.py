"""What is published is what the engine gave, whatever the sizes of tensors and chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learner import weight_publisher
from learner.weight_publisher import ObjectStorePublisher, make_probe
from ray_rl.errors import NotWritten
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import ObjectStorePayload, WeightManifest, digest_bytes


class FakeEngine:
    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.world_size = 2
        self.vocab_size = 50
        self.gathered = 0
        torch.manual_seed(0)
        self.parameters: dict[str, Tensor] = {
            "embedding": torch.randn(50, 7),
            "odd": torch.randn(3).to(torch.bfloat16),
            "scalar": torch.tensor(2.5),
            "transposed": torch.randn(40, 13).T,
            "large": torch.randn(300, 33),
        }

    def parameter_bytes(self) -> list[int]:
        return [tensor.nbytes for tensor in self.parameters.values()]

    def named_parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.parameters.items():
            self.gathered += 1
            yield name, tensor

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return [-float(token) for token in token_ids[1:]]


class FakeStore:
    def __init__(self) -> None:
        self.objects: list[np.ndarray] = []

    def put(self, chunk: np.ndarray) -> int:
        self.objects.append(chunk.copy())
        return len(self.objects) - 1


def publisher(engine: FakeEngine, store: FakeStore, folder: Path) -> ObjectStorePublisher:
    return ObjectStorePublisher(engine, NodeWeightFile("run", folder), chunk_mib=1, timeout=5, put=store.put)


def home(folder: Path) -> str:
    """Of an engine that sees the publisher's files."""
    return NodeWeightFile("run", folder).identity


def published(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tuple[FakeEngine, FakeStore, ObjectStorePayload]:
    monkeypatch.setattr(weight_publisher, "_MIB", chunk_bytes)
    engine, store = FakeEngine(), FakeStore()
    payload = publisher(engine, store, folder).publish(3, [home(folder)], stored=True)
    assert payload is not None
    return engine, store, payload


def tensors_of(content: bytes, payload: ObjectStorePayload) -> dict[str, Tensor]:
    tensors = {}
    for entry in payload.manifest.tensors:
        data = content[entry.offset : entry.offset + entry.nbytes]
        assert digest_bytes(data) == entry.digest, entry.name
        flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, entry.dtype))
        tensors[entry.name] = flat.reshape(entry.shape)
    return tensors


@pytest.mark.parametrize("chunk_bytes", [1, 63, 64, 1000, 4096, 10_000_000])
def test_file_chunks_and_manifest_give_every_tensor_back_bit_for_bit(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, store, payload = published(chunk_bytes, monkeypatch, tmp_path)
    content = b"".join(store.objects[ref].tobytes() for ref in payload.chunks)
    assert (tmp_path / "ray-rl-run-v3.bin").read_bytes() == content
    tensors = tensors_of(content, payload)
    assert list(tensors) == list(engine.parameters)
    for name, tensor in engine.parameters.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_engines_that_see_the_file_need_no_objects(tmp_path: Path) -> None:
    store = FakeStore()
    payload = publisher(FakeEngine(), store, tmp_path).publish(3, [home(tmp_path)] * 2, stored=False)
    assert payload is not None
    assert payload.home == home(tmp_path)
    assert payload.chunks == ()
    assert store.objects == []
    tensors_of((tmp_path / "ray-rl-run-v3.bin").read_bytes(), payload)


def test_an_engine_elsewhere_gets_objects_and_the_file_stays_for_the_one_here(tmp_path: Path) -> None:
    store = FakeStore()
    payload = publisher(FakeEngine(), store, tmp_path).publish(3, [home(tmp_path), "elsewhere"], stored=False)
    assert payload is not None
    content = b"".join(chunk.tobytes() for chunk in store.objects)
    assert (tmp_path / "ray-rl-run-v3.bin").read_bytes() == content
    tensors_of(content, payload)


@pytest.mark.parametrize(("homes", "stored"), [(["elsewhere"], False), (["elsewhere"], True), ([], True)])
def test_with_objects_and_without_an_engine_on_the_learners_node_no_file_stays(
    homes: list[str], stored: bool, tmp_path: Path
) -> None:
    store = FakeStore()
    payload = publisher(FakeEngine(), store, tmp_path).publish(3, homes, stored=stored)
    assert payload is not None
    tensors_of(b"".join(chunk.tobytes() for chunk in store.objects), payload)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.partial"))


def test_when_all_engines_are_gone_the_file_stays_for_those_that_replace_them_here(tmp_path: Path) -> None:
    payload = publisher(FakeEngine(), FakeStore(), tmp_path).publish(3, [], stored=False)
    assert payload is not None
    assert payload.chunks == ()
    tensors_of((tmp_path / "ray-rl-run-v3.bin").read_bytes(), payload)


def test_engines_may_come_and_go_between_publications(tmp_path: Path) -> None:
    ours, store = publisher(FakeEngine(), FakeStore(), tmp_path), FakeStore()
    ours._put = store.put
    chunks = []
    for version, homes in enumerate([[home(tmp_path)], ["elsewhere"], [home(tmp_path)]]):
        payload = ours.publish(version, homes, stored=False)
        assert payload is not None
        chunks.append(bool(payload.chunks))
        content = (
            b"".join(chunk.tobytes() for chunk in store.objects)
            or (tmp_path / f"ray-rl-run-v{version}.bin").read_bytes()
        )
        tensors_of(content, payload)
        store.objects.clear()
    assert chunks == [False, True, False]


def test_a_version_published_again_holds_the_weights_of_now(tmp_path: Path) -> None:
    engine = FakeEngine()
    ours = publisher(engine, FakeStore(), tmp_path)
    ours.publish(3, [home(tmp_path)], stored=False)
    engine.parameters = {"embedding": torch.full((2, 2), 7.0)}
    again = ours.publish(3, [home(tmp_path)], stored=False)
    assert again is not None
    tensors = tensors_of((tmp_path / "ray-rl-run-v3.bin").read_bytes(), again)
    assert torch.equal(tensors["embedding"], engine.parameters["embedding"])


def test_all_chunks_but_the_last_have_the_configured_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, store, _ = published(1000, monkeypatch, tmp_path)
    sizes = [len(chunk) for chunk in store.objects]
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000


def test_tensors_start_where_any_number_format_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, _, payload = published(1000, monkeypatch, tmp_path)
    assert all(entry.offset % 64 == 0 for entry in payload.manifest.tensors)


def test_the_manifest_survives_a_channel_of_plain_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, _, payload = published(1000, monkeypatch, tmp_path)
    assert payload.manifest.version == 3
    assert WeightManifest.from_dict(payload.manifest.to_dict()) == payload.manifest


def test_the_probe_carries_the_learners_logprobs_of_a_fixed_prompt() -> None:
    engine = FakeEngine()
    probe = make_probe(engine)
    assert probe.token_ids == make_probe(engine).token_ids
    assert list(probe.logprobs) == engine.logprobs(probe.token_ids)
    assert all(0 <= token < engine.vocab_size for token in probe.token_ids)
    assert len(set(probe.token_ids)) > 10


def test_other_ranks_take_part_in_gathering_and_publish_nothing(tmp_path: Path) -> None:
    engine, store = FakeEngine(rank=1), FakeStore()
    assert publisher(engine, store, tmp_path).publish(3, [home(tmp_path)], stored=True) is None
    assert not list(tmp_path.glob("*.bin"))
    assert engine.gathered == len(engine.parameters)
    assert store.objects == []


def test_version_after_version_is_written_into_the_same_memory_through_one_mapping(tmp_path: Path) -> None:
    engine = FakeEngine()
    files = NodeWeightFile("run", tmp_path)
    ours = ObjectStorePublisher(engine, files, chunk_mib=1, timeout=5)
    places, mappings = set(), set()
    for version in range(3):
        engine.parameters = {name: tensor + version for name, tensor in engine.parameters.items()}
        payload = ours.publish(version, [files.identity], stored=False)
        assert payload is not None
        content = files.path(version)
        tensors = tensors_of(content.read_bytes(), payload)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in engine.parameters.items())
        places.add(content.stat().st_ino)
        assert ours._mapping is not None
        mappings.add(ours._mapping[1].ctypes.data)
    assert len(places) == len(mappings) == 1
    assert [path.name for path in tmp_path.glob("*-v*")] == ["ray-rl-run-v2.bin"]


def test_a_memory_that_is_too_small_is_an_error_and_no_signal(tmp_path: Path) -> None:
    files = NodeWeightFile("run", tmp_path)
    engine = FakeEngine()
    engine.parameter_bytes = lambda: [10**18]  # more than any memory has
    ours = ObjectStorePublisher(engine, files, chunk_mib=1, timeout=5)
    with pytest.raises(NotWritten, match="shared memory"):
        ours.publish(1, [files.identity], stored=False)
    assert not list(tmp_path.glob("*-v*"))
