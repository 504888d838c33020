"""The engine's end of an NCCL transfer: which of vLLM's verbs it calls, in which order, and what it says after a failure."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from actors.engine import Engine
from ray_rl.config import resolve_config
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.weight_manifest import WeightTransferError


class Llm:
    """vLLM's AsyncLLM, as far as a transfer sees it; every verb is one that the installed vLLM has."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails: dict[str, BaseException] = {}

    def __getattr__(self, verb: str) -> Any:
        assert hasattr(AsyncLLM, verb), verb

        async def call(*args: Any, **options: Any) -> None:
            self.calls.append((verb, args[0] if args else options or None))
            if verb in self.fails:
                raise self.fails[verb]

        return call

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.calls]


@pytest.fixture
def llm() -> Llm:
    return Llm()


@pytest.fixture
def engine(llm: Llm) -> Engine:
    gpus = {"rollout": {"gpus_per_actor": 1}, "learner": {"gpus_per_rank": 1}}
    config = resolve_config({**gpus, "weights": {"kind": "nccl", "timeout": 5}})
    return Engine(llm, config, [1])  # type: ignore[arg-type]


async def test_a_transfer_is_vllms_verbs_in_vllms_order(engine: Engine, llm: Llm) -> None:
    update = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2]]}
    await engine.nccl("init", {"rank_offset": 3, "world_size": 4})
    await engine.nccl("start", {"version": 2})
    await engine.nccl("update", update)
    await engine.nccl("finish", {"version": 2})
    assert llm.verbs == [
        "shutdown_weight_transfer_engine",
        "init_weight_transfer_engine",
        "pause_generation",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "update_weight_version",
        "resume_generation",
    ]
    given = dict(llm.calls)
    assert given["init_weight_transfer_engine"].init_info == {"rank_offset": 3, "world_size": 4}
    assert given["pause_generation"] == {"mode": "keep", "clear_cache": True}
    assert given["update_weights"].update_info == update
    assert given["update_weight_version"] == "2"
    assert engine.policy_version == 2
    assert engine.pause_seconds > 0


async def test_what_a_worker_says_against_a_step_is_why_the_engine_serves_no_more(engine: Engine, llm: Llm) -> None:
    llm.fails["update_weights"] = Exception("shape mismatch")
    await engine.nccl("start", {"version": 2})
    with pytest.raises(WeightTransferError, match="shape mismatch"):
        await engine.nccl("update", {"names": []})
    with pytest.raises(WeightTransferError, match="this engine does not serve"):
        await engine.generate([5], n=1, max_tokens=1)
    assert engine.policy_version == 0


async def test_so_is_a_group_that_does_not_form_in_time(engine: Engine, llm: Llm) -> None:
    llm.fails["init_weight_transfer_engine"] = DeadlineExceeded("waited 5 s")
    with pytest.raises(DeadlineExceeded):
        await engine.nccl("init", {"rank_offset": 1})
    with pytest.raises(WeightTransferError, match="this engine does not serve"):
        await engine.generate([5], n=1, max_tokens=1)
