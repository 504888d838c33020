"""What the pool's client makes of Ray's errors; no Ray is started here."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.engine import EngineDied
from actors.pool import ActorDied
from actors.rollout_actor import _result


async def failing(error: Exception) -> None:
    raise error


async def test_the_death_of_an_engine_is_the_death_of_its_actor():
    error = RayTaskError("collect", "trace", EngineDied("the engine's process is gone"), proctitle="a", pid=1, ip="b")
    with pytest.raises(ActorDied, match=r"^the engine's process is gone$"):
        await _result(failing(error.as_instanceof_cause()))


async def test_the_death_of_an_actor_is_named():
    with pytest.raises(ActorDied):
        await _result(failing(ActorDiedError()))


async def test_other_errors_of_an_actor_stay_what_they_are():
    error = RayTaskError("collect", "trace", ValueError("x"), proctitle="a", pid=1, ip="b")
    with pytest.raises(ValueError, match="trace"):
        await _result(failing(error.as_instanceof_cause()))
