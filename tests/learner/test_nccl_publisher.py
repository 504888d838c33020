"""vLLM's own sender drives our client and our source; only the communicator and the engines are pretended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

from learner import nccl_publisher
from learner.adapters import plain_parameters
from learner.nccl_publisher import DeepSpeedSource, NcclPublisher, RolloutActorsClient
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.errors import RunError


class Wire:
    """What happened in which order, and a communicator that keeps what is sent."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.sent: list[tuple[str, Tensor]] = []
        self.receiving = threading.Event()
        self.disabled = False

    def destroy(self) -> None:
        self.events.append(("destroy", None))

    def broadcast_all(self, iterator: Iterator[tuple[str, Tensor]], group: object, **geometry: object) -> None:
        """In place of vLLM's packing, which wants streams; waits for a receiver as NCCL would."""
        assert group is self
        assert self.receiving.wait(5)
        self.sent = [(name, tensor.clone()) for name, tensor in iterator]
        self.events.append(("broadcast", geometry["src"]))


class Verb:
    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def remote(self, verb: str, info: Any) -> Callable[[], None]:
        return lambda: self._actor.take(verb, info)


class Actor:
    """A rollout actor's handle."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.nccl = Verb(self)
        self.infos: list[tuple[str, Any]] = []
        self._name = name
        self._wire = wire
        self.hangs_in: str | None = None

    def take(self, verb: str, info: Any) -> None:
        if verb == self.hangs_in:
            time.sleep(1.5)
        self.infos.append((verb, info))
        self._wire.events.append((f"{self._name} {verb}", None))
        if verb == "update":
            self._wire.receiving.set()


class Owner:
    """A rank's engine, whose second parameter is shared out among the ranks."""

    vocab_size = 50
    world_size = 2
    device = torch.device("cpu")

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.gathered: list[str] = []
        self.parameters = {"embed": torch.randn(5, 3).bfloat16(), "layer": torch.randn(4, 2).bfloat16()}

    def parameter_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.parameters.items()]

    def named_parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.parameters.items():
            self.gathered.append(name)
            yield name, tensor

    def parameter_bytes(self) -> list[int]:
        return [tensor.nbytes for tensor in self.parameters.values()]

    def logprobs(self, token_ids: object) -> list[float]:
        return []


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()

    def open_endpoint(info: Any) -> Wire:
        wire.events.append(("sender joins", info.world_size))
        return wire

    def get(calls: list[Callable[[], None]], seconds: float, *, what: str) -> None:
        """Ray's; an actor that hangs is told by the deadline."""
        started = time.monotonic()
        for call in calls:
            call()
        if time.monotonic() - started > seconds:
            raise DeadlineExceeded(f"waited {seconds:g} s for {what}")

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", wire.broadcast_all)
    monkeypatch.setattr(nccl_publisher, "get", get)
    return wire


def publisher(owner: Owner, actors: list[Actor], *, gpus_per_engine: int = 1, timeout: float = 5) -> NcclPublisher:
    return NcclPublisher(owner, actors, address="10.0.0.1", port=4000, gpus_per_engine=gpus_per_engine, timeout=timeout)


def of_verb(actor: Actor, verb: str) -> Any:
    (info,) = (info for name, info in actor.infos if name == verb)
    return info


@pytest.mark.parametrize(("gpus", "offsets", "world"), [(1, [1, 2, 3], 4), (2, [1, 3, 5], 7)])
def test_every_gpu_of_every_engine_is_a_rank_behind_the_sender(
    wire: Wire, gpus: int, offsets: list[int], world: int
) -> None:
    actors = [Actor(name, wire) for name in "abc"]
    publisher(Owner(), actors, gpus_per_engine=gpus)
    infos = [NCCLWeightTransferInitInfo(**of_verb(actor, "init")) for actor in actors]
    assert [info.rank_offset for info in infos] == offsets
    assert {info.world_size for info in infos} == {world}
    assert ("sender joins", world) in wire.events
    assert {(info.master_address, info.master_port, info.packed) for info in infos} == {("10.0.0.1", 4000, True)}


def test_a_publication_pauses_receives_labels_and_resumes_in_this_order(wire: Wire) -> None:
    actor = Actor("a", wire)
    owner = Owner()
    sender = publisher(owner, [actor])
    wire.events.clear()
    sender.publish(7)
    assert [name for name, _ in wire.events] == ["a start", "a update", "broadcast", "a finish"]
    assert of_verb(actor, "start") == of_verb(actor, "finish") == {"version": 7}
    assert of_verb(actor, "update") == {
        "names": ["embed", "layer"],
        "dtype_names": ["bfloat16", "bfloat16"],
        "shapes": [[5, 3], [4, 2]],
    }
    assert all(torch.equal(tensor, owner.parameters[name]) for name, tensor in wire.sent)
    assert owner.gathered == ["embed", "layer"], "gathered once, and not for names and shapes"


def test_other_ranks_only_take_part_in_gathering(wire: Wire) -> None:
    actor, owner = Actor("a", wire), Owner(rank=1)
    publisher(owner, [actor]).publish(1)
    assert owner.gathered == ["embed", "layer"]
    assert (actor.infos, wire.events) == ([], [])


def test_a_closed_publisher_has_left_its_group(wire: Wire) -> None:
    sender = publisher(Owner(), [Actor("a", wire)])
    sender.close()
    assert wire.events[-1] == ("destroy", None)
    sender.close()
    assert wire.events.count(("destroy", None)) == 1


def test_an_engine_that_hangs_is_told_by_a_deadline(wire: Wire) -> None:
    actor = Actor("a", wire)
    sender = publisher(Owner(), [actor], timeout=0.5)
    actor.hangs_in = "update"
    with pytest.raises(DeadlineExceeded, match=r"version 3 to be sent by NCCL"):
        sender.publish(3)


def test_without_nccl_nothing_is_sent_and_that_is_said(wire: Wire) -> None:
    wire.disabled = True
    with pytest.raises(RunError, match=r"weights\.kind: nccl, but vLLM finds no NCCL library"):
        publisher(Owner(), [Actor("a", wire)])


def test_the_client_has_vllms_four_verbs() -> None:
    assert isinstance(RolloutActorsClient([], gpus_per_engine=1, timeout=1), VLLMWeightSyncClient)


def test_a_source_that_disagrees_with_its_shapes_sends_nothing_more(wire: Wire) -> None:
    owner = Owner()
    sender = publisher(owner, [Actor("a", wire)])
    owner.parameter_shapes = lambda: [("embed", torch.bfloat16, (5, 3)), ("layer", torch.float32, (4, 2))]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="disagrees with iteration at index 1"):
        sender.publish(1)


class Sharded(torch.nn.Module):
    """Parameters as ZeRO-3 leaves them between their turns: empty, with the whole's shape beside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))
        self.weight.ds_shape = torch.Size([6, 4])  # type: ignore[attr-defined]
        self.norm = torch.nn.Parameter(torch.ones(6))


def test_shapes_under_zero_3_are_those_of_the_whole() -> None:
    found = {parameter.name: (parameter.shape, parameter.numel) for parameter in plain_parameters(Sharded())}
    assert found == {"weight": ((6, 4), 24), "norm": ((6,), 6)}


def test_a_source_can_be_iterated_again_and_again() -> None:
    owner = Owner()
    source = DeepSpeedSource(owner)
    assert [meta.name for meta in source.metadata()] == [name for name, _ in source] == [name for name, _ in source]
