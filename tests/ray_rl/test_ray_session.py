"""Errors of actors and of groups of tasks come out as what they were; no Ray is started here."""

import asyncio

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from ray_rl.config import resolve_config
from ray_rl.deadlines import DeadlineExceeded, wait
from ray_rl.errors import ConfigError, RunError
from ray_rl.ray_session import own_cpus, placement_seconds, ray_session, run_to_end


def of_an_actor(cause: Exception) -> Exception:
    """As Ray raises it where the actor's answer is awaited."""
    error = RayTaskError("collect", "Traceback ...", cause, proctitle="ray::Actor", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


async def in_a_group(error: Exception) -> None:
    async def fail() -> None:
        raise error

    async with asyncio.TaskGroup() as outer:
        outer.create_task(fail())


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_out_of_a_group_of_tasks_is_told_in_its_own_line(wrapped):
    async def late() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait(asyncio.sleep(1), 0.01, what="an engine"))

    error = RunError("plain")
    work = in_a_group(of_an_actor(error)) if wrapped else late()
    with pytest.raises(RunError if wrapped else DeadlineExceeded) as raised:
        run_to_end(work)
    assert str(raised.value).startswith("plain" if wrapped else "waited 0.01 s for an engine, and it did not come")


def test_an_actors_run_error_is_told_without_its_traceback():
    async def work() -> None:
        raise of_an_actor(RunError("the grader did not start"))

    with pytest.raises(RunError) as raised:
        run_to_end(work())
    assert str(raised.value) == "the grader did not start"


def test_an_actors_bug_keeps_its_traceback():
    async def work() -> None:
        raise of_an_actor(KeyError("x"))

    with pytest.raises(RayTaskError, match="ray::Actor"):
        run_to_end(work())


def test_the_death_of_an_actor_is_one_line():
    async def work() -> None:
        raise ActorDiedError()

    with pytest.raises(RunError, match=r"^an actor's process died: .*$"):
        run_to_end(work())


def test_a_second_interrupt_ends_as_an_interrupt():
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run_to_end(work())


def test_a_ray_of_the_runs_own_is_not_waited_for_but_a_cluster_may_grow(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    assert placement_seconds(resolve_config({})) < 10
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert placement_seconds(resolve_config({"ray": {"placement_timeout": 300}})) == 300


def test_a_cluster_that_is_not_there_is_the_users_mistake_and_known_at_once():
    config = resolve_config({"ray": {"address": "127.0.0.1:1"}})
    line = r"^ray.address: no Ray cluster could be joined at 127.0.0.1:1: .*refused"
    with pytest.raises(ConfigError, match=line), ray_session(config):
        pass


def test_a_ray_of_the_runs_own_has_room_for_more_actors_than_the_recipe_asks_for():
    assert own_cpus(resolve_config({})) == 1 + 16
    assert own_cpus(resolve_config({"rollout": {"num_actors": 40}})) == 1 + 40
    assert own_cpus(resolve_config({"ray": {"num_cpus": 3}})) == 3


def test_a_ray_of_the_runs_own_has_no_dashboard_and_so_no_job_server(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    options = {}
    monkeypatch.setattr(ray, "init", options.update)
    with ray_session(resolve_config({})):
        assert options["address"] == "local"
        assert options["include_dashboard"] is False
