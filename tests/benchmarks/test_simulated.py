import asyncio
from pathlib import Path

from benchmarks.scale import relative_duration
from benchmarks.simulated import Simulation, simulate


def test_a_simulated_run_does_every_step_with_the_real_pool_and_orchestrator(tmp_path: Path) -> None:
    simulation = Simulation(
        steps=3,
        actors=5,
        groups_in_flight=2,
        batch=10,
        max_staleness=1,
        group_seconds=lambda position: 0.001,
        train_seconds=0.001,
    )
    steps = asyncio.run(simulate(simulation, tmp_path / "run"))
    assert [step.metrics["pool/actors"] for step in steps] == [5, 5, 5]
    assert [step.metrics["ledger/trained"] for step in steps] == [10, 20, 30]


def test_every_batch_of_the_scale_case_is_the_same_work_in_another_order() -> None:
    first, second = ([relative_duration(position) for position in range(start, start + 8)] for start in (0, 8))
    assert sorted(first) == sorted(second)
    assert first != second
