"""From the learner's gathered parameters to engines that go on with them, over vLLM's bare load from memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.rollout_actor import RolloutActor
from actors.rollout_client import RayRolloutClient, create_rollout_client
from benchmarks.fetch_smollm2 import ensure
from benchmarks.suite import Case, CaseResult, Options, median
from learner.group import LearnerGroup
from ray_rl.config import RunConfig, resolve_config
from ray_rl.embedded import policy_path
from ray_rl.weight_file import sweep
from ray_rl.weight_manifest import ObjectStorePayload

_TIMES = ("sync", "learner", "pause", "proof", "bare load")


def run(options: Options) -> CaseResult:
    """Each model with one actor and with four on this machine; publications and bare loads alternate."""
    smollm2 = ensure(options.work)
    rows, details = [], {}
    headline: dict[str, dict[str, float]] = {"sync_over_bare_load": {}, "sync_seconds": {}}
    for subject, path in {"embedded": policy_path(), "smollm2": smollm2}.items():
        for actors in (1,) if options.quick else (1, 4):
            measured, megabytes = asyncio.run(_measure(path, actors, 2 if options.quick else options.repeats))
            medians = {name: median([times[name] for times in measured]) for name in _TIMES}
            ratio = median([times["sync"] / times["bare load"] for times in measured])
            name = f"{subject}, {actors} actor{'s' if actors > 1 else ''}"
            rows.append(
                {"case": name, "MB": round(megabytes), **{f"{t} s": medians[t] for t in _TIMES}, "sync / bare": ratio}
            )
            headline["sync_over_bare_load"][name] = ratio
            headline["sync_seconds"][name] = medians["sync"]
            details[name] = measured
    return CaseResult(headline=headline, rows=rows, details=details)


class BareLoadingActor(RolloutActor):
    """A rollout actor whose engine can also load weights that its worker holds."""

    async def start(self) -> None:
        """Load the engine, with the verbs of `BareLoadExtension`."""
        from actors import engine_args

        engine_args.WORKER_EXTENSION = "benchmarks.bare_load.BareLoadExtension"
        await super().start()

    async def hold_weights(self, payload: ObjectStorePayload) -> None:
        """Bring a version's tensors into the worker's memory."""
        path = await self._weight_file(payload)
        await self._engine._llm.collective_rpc("hold_weights", args=(payload.manifest.to_dict(), str(path)))

    async def bare_load(self) -> float:
        """Seconds of vLLM's own load."""
        (seconds,) = await self._engine._llm.collective_rpc("bare_load")
        return seconds


async def _measure(model: Path, actors: int, repeats: int) -> tuple[list[dict[str, float]], float]:
    config = _config(model, actors)
    ray.init(address="local", num_cpus=2 * actors + 2, include_dashboard=False, object_store_memory=800 * 2**20)
    run_id = f"bench-{os.getpid()}"
    clients = [
        create_rollout_client(config, str(model), run_id, index, reward_actors=[], kind=BareLoadingActor)
        for index in range(actors)
    ]
    learner = None
    try:
        # One after the other: engines that start side by side on few cores may not be ready in time.
        for client in clients:
            await client.start()
        learner = await LearnerGroup.start(config, str(model), run_id, may_grow=False)
        weights = await learner.publish(0, [client.receiver for client in clients])
        await asyncio.gather(*(client.handle.hold_weights.remote(weights.payload) for client in clients))
        measured = [await _publish_and_load(learner, clients, version) for version in range(1, repeats + 2)]
        return measured[1:], weights.payload.manifest.nbytes / 1e6
    finally:
        await asyncio.gather(*(client.shutdown() for client in clients))
        if learner:
            learner.shutdown()
        ray.shutdown()
        sweep(run_id)


async def _publish_and_load(
    learner: LearnerGroup, clients: Sequence[RayRolloutClient], version: int
) -> dict[str, float]:
    started = time.monotonic()
    weights = await learner.publish(version, [client.receiver for client in clients])
    published = time.monotonic()

    pauses = await asyncio.gather(*(client.receive_weights(weights) for client in clients))
    resumed = time.monotonic()
    probe = await weights.probe()
    differences = await asyncio.gather(*(client.prove_weights(probe) for client in clients))
    proven = time.monotonic()
    assert max(differences) < 1e-4
    loads = await asyncio.gather(*(client.handle.bare_load.remote() for client in clients))
    return {
        "sync": resumed - started,
        "learner": published - started,
        "pause": max(pauses),
        "proof": proven - resumed,
        "bare load": max(loads),
    }


def _config(model: Path, actors: int) -> RunConfig:
    rollout: dict[str, Any] = {"num_actors": actors, "cpus_per_actor": 1 if actors > 1 else 2, "kv_cache_gib": 0.25}
    return resolve_config(
        {
            "model": {"path": str(model), "max_model_len": 256},
            "rollout": {**rollout, "max_tokens": 64},
            "learner": {"cpus_per_rank": 2},
            "evaluation": {"problems": 1},
        }
    )


WEIGHTS = Case(
    name="weights", about="gathered parameters to engines that go on, over vLLM's bare load from memory", run=run
)
