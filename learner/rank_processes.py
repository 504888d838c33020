"""The processes of the learner's ranks: what each is started with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_rl.config.run import RunConfig
from ray_rl.run_logs import log_environment

_CPU_MEMORY = {
    # glibc would give the memory of each large tensor back to the system and fetch it anew, zeroed page by page, for the next
    # one: up to a tenth of a training step. Kept, it is the peak that every step needs anyway.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    # All that is kept in the first heap only, and the verbs do not run in the thread that has it.
    "MALLOC_ARENA_MAX": "1",
}
"""How a rank without a GPU keeps its memory; what the user's shell sets wins."""


def start_ranks(
    config: RunConfig, model_path: str, run_id: str, places: Sequence[Mapping[str, Any]], logs: Path | None = None
) -> list[Any]:
    """Ask Ray for an actor per rank, without waiting for them.

    Args:
        config: the run's.
        model_path: as `LearnerActor`.
        run_id: as `LearnerActor`.
        places: by rank, the options that put it in its place (`Places.options`).
        logs: the run's logs/, if it has a folder.
    """
    from learner.learner_actor import LearnerActor

    handles = []
    for rank, place in enumerate(places):
        # Ray shows each rank its own GPUs only, so that every rank's device is the first.
        env_vars = {"RANK": str(rank), "WORLD_SIZE": str(len(places)), "LOCAL_RANK": "0"}
        env_vars |= log_environment(logs, f"learner-{rank}")
        if config.learner.gpus_per_rank == 0:
            env_vars["DS_ACCELERATOR"] = "cpu"
            env_vars |= {name: os.environ.get(name, value) for name, value in _CPU_MEMORY.items()}
        options = LearnerActor.options(**place, runtime_env={"env_vars": env_vars})  # type: ignore[attr-defined]
        handles.append(options.remote(config, model_path, run_id, rank))
    return handles
