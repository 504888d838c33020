"""What is published is what the engine gave, whatever the sizes of tensors and chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from learner import weight_publisher
from learner.weight_publisher import ObjectStorePublisher, probe_prompt
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


def published(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeEngine, FakeStore, ObjectStorePayload]:
    monkeypatch.setattr(weight_publisher, "_MIB", chunk_bytes)
    engine, store = FakeEngine(), FakeStore()
    weights = ObjectStorePublisher(engine, chunk_mib=1, put=store.put).publish(3)
    assert weights is not None
    assert weights.version == 3
    return engine, store, weights.payload


def tensors_of(store: FakeStore, payload: ObjectStorePayload) -> dict[str, Tensor]:
    content = b"".join(store.objects[ref].tobytes() for ref in payload.chunks)
    tensors = {}
    for entry in payload.manifest.tensors:
        data = content[entry.offset : entry.offset + entry.nbytes]
        assert digest_bytes(data) == entry.digest, entry.name
        flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, entry.dtype))
        tensors[entry.name] = flat.reshape(entry.shape)
    return tensors


@pytest.mark.parametrize("chunk_bytes", [1, 63, 64, 1000, 4096, 10_000_000])
def test_chunks_and_manifest_give_every_tensor_back_bit_for_bit(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store, payload = published(chunk_bytes, monkeypatch)
    tensors = tensors_of(store, payload)
    assert list(tensors) == list(engine.parameters)
    for name, tensor in engine.parameters.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_all_chunks_but_the_last_have_the_configured_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _, store, _ = published(1000, monkeypatch)
    sizes = [len(chunk) for chunk in store.objects]
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000


def test_tensors_start_where_any_number_format_may(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, payload = published(1000, monkeypatch)
    assert all(entry.offset % 64 == 0 for entry in payload.manifest.tensors)


def test_the_manifest_survives_a_channel_of_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, payload = published(1000, monkeypatch)
    assert payload.manifest.version == 3
    assert WeightManifest.from_dict(payload.manifest.to_dict()) == payload.manifest


def test_the_probe_carries_the_learners_logprobs_of_a_fixed_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, payload = published(1000, monkeypatch)
    assert payload.probe.token_ids == probe_prompt(engine.vocab_size)
    assert list(payload.probe.logprobs) == engine.logprobs(payload.probe.token_ids)
    assert all(0 <= token < engine.vocab_size for token in payload.probe.token_ids)
    assert len(set(payload.probe.token_ids)) > 10


def test_other_ranks_take_part_in_gathering_and_publish_nothing() -> None:
    engine, store = FakeEngine(rank=1), FakeStore()
    assert ObjectStorePublisher(engine, chunk_mib=1, put=store.put).publish(3) is None
    assert engine.gathered == len(engine.parameters)
    assert store.objects == []
