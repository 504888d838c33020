"""How many rollout actors one driver can lead: the real orchestrator and pool over 1 to 512 actors that only sleep.

Work grows with the actors (weak scaling): a batch holds so many groups for each of them. Linear would be: n actors finish n
times the groups of one. The last row, with groups that are over in no time, shows where it bends: when the driver's one thread
has no time left. What a real engine costs the driver besides, a Ray call for each group, is not in it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import psutil

from benchmarks.simulated import SimulatedActor, Simulation, simulate
from benchmarks.suite import Case, CaseResult, Options

_SIZES = (1, 4, 16, 64, 256, 512)
_QUICK_SIZES = (1, 16, 64)
_JUDGED = 64
"""Actors for which the headline's numbers are."""
_GROUPS_IN_FLIGHT = 4
_BATCH_PER_ACTOR = 8
_GROUP_SECONDS = 2.0
"""Median."""
_FLOOD_SECONDS = 0.1
"""Median of the last row: more groups than a driver can take."""
_SPREAD = 0.4
"""Standard deviation of the logarithm of a group's seconds."""
_STRATA = 8
"""So many prompts in succession have the same durations in another order: each batch is as much work as any other."""
_TRAIN_SECONDS = 0.05
_MARGIN = 2
"""Steps at either end that do not count: the pipeline fills, and empties."""
_LINEAR = 0.9
"""Efficiency below which scaling is said to bend."""


def run(options: Options) -> CaseResult:
    """Each size in a process of its own, so that its memory is its own."""
    steps = 4 if options.quick else 10
    sizes = _QUICK_SIZES if options.quick else _SIZES
    measured = {f"{size}": _measured(size, steps, _GROUP_SECONDS) for size in sizes}
    flood = f"{sizes[-1]}, groups of {_FLOOD_SECONDS:g} s"
    measured[flood] = _measured(sizes[-1], 2 * steps, _FLOOD_SECONDS)
    of_one = measured["1"]["groups_per_second"] * _GROUP_SECONDS
    rows: list[dict[str, Any]] = [
        {
            "actors": name,
            "groups/s": numbers["groups_per_second"],
            "efficiency": numbers["groups_per_second"] / (numbers["actors"] * of_one / numbers["group_seconds"]),
            "driver ms/group": numbers["driver_ms_per_group"],
            "of it sleeping ms": numbers["sleeping_ms_per_group"],
            "of a core": numbers["core_share"],
            "publication ms": numbers["publication_ms"],
            "KiB/actor": numbers["kib_per_actor"],
            "RSS MiB": numbers["rss_mib"],
        }
        for name, numbers in measured.items()
    ]
    by_name = {row["actors"]: row for row in rows}
    bent = [int(measured[row["actors"]]["actors"]) for row in rows[:-1] if row["efficiency"] < _LINEAR]
    headline = {
        "efficiency_at_64": by_name[f"{_JUDGED}"]["efficiency"],
        "driver_ms_per_group": by_name[f"{_JUDGED}"]["driver ms/group"],
        "efficiency_at_most": rows[-2]["efficiency"],
        "bends_at": bent[0] if bent else math.nan,
        "most_groups_per_second": by_name[flood]["groups/s"],
        "core_share_at_most": by_name[flood]["of a core"],
    }
    return CaseResult(headline=headline, rows=rows, details=measured)


def _measured(actors: int, steps: int, group_seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", str(actors), str(steps), str(group_seconds)]
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, check=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(actors: int, steps: int, group_seconds: float) -> dict[str, float]:
    """In this process, which does nothing else."""
    batch = _BATCH_PER_ACTOR * actors
    sleeping = asyncio.run(_cost_of_sleeping(4096))
    before = psutil.Process().memory_info().rss
    simulation = Simulation(
        steps=steps + 2 * _MARGIN,
        actors=actors,
        groups_in_flight=_GROUPS_IN_FLIGHT,
        batch=batch,
        max_staleness=1,
        group_seconds=lambda position: group_seconds * relative_duration(position),
        train_seconds=_TRAIN_SECONDS,
    )
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(simulate(simulation, Path(folder) / "run"))
    after = psutil.Process().memory_info().rss
    first, last = measured[_MARGIN - 1], measured[-1 - _MARGIN]
    groups, seconds, cpu = batch * steps, last.ended - first.ended, last.cpu_seconds - first.cpu_seconds
    publications = [step.metrics["timing/weight_sync"] for step in measured[_MARGIN:-_MARGIN]]
    return {
        "actors": actors,
        "group_seconds": group_seconds,
        "groups_per_second": groups / seconds,
        "driver_ms_per_group": 1000 * cpu / groups,
        "sleeping_ms_per_group": 1000 * sleeping,
        "core_share": cpu / seconds,
        "publication_ms": 1000 * sum(publications) / len(publications),
        "kib_per_actor": (after - before) / 1024 / actors,
        "rss_mib": after / 2**20,
        "dropped": last.metrics["groups/dropped"],
    }


async def _cost_of_sleeping(groups: int) -> float:
    """CPU seconds that a simulated engine itself takes for a group; they are in what the driver is said to take."""
    from ray_rl.types import Problem, Prompt

    actor = SimulatedActor(0, lambda position: 0.01)
    prompt = Prompt(problem=Problem(problem_id="p", prompt="p", answer=""), position=0, token_ids=(0,))
    started = time.process_time()
    await asyncio.gather(*(actor.collect(prompt) for _ in range(groups)))
    return (time.process_time() - started) / groups


def relative_duration(position: int) -> float:
    """How long the group of a prompt takes, over the median: log-normal by strata."""
    stratum, index = divmod(position, _STRATA)
    return _durations(stratum)[index]


@lru_cache(maxsize=65536)
def _durations(stratum: int) -> list[float]:
    quantiles = [NormalDist().inv_cdf((index + 0.5) / _STRATA) for index in range(_STRATA)]
    durations = [math.exp(_SPREAD * quantile) for quantile in quantiles]
    random.Random(stratum).shuffle(durations)
    return durations


SCALE = Case(
    name="scale", about="groups/s of 1 to 512 simulated actors over linear, and what they cost the driver", run=run
)

if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
