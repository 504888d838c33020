import asyncio

import pytest

from ray_rl import mailbox
from ray_rl.deadlines import DeadlineExceeded
from ray_rl.mailbox import Answer, Mailbox, RunStatus
from ray_rl.protocols import ActorStatus
from ray_rl.status_view import status_lines


def status(**known) -> RunStatus:
    usual = {
        "name": "run",
        "step": 3,
        "steps": 12,
        "phase": "training",
        "seconds_since_step": 75.0,
        "policy_version": 3,
        "buffer_depth": 2,
        "actors_wanted": 1,
        "actors": (ActorStatus(name="rollout actor 0", state="serving", groups=4, served=96),),
        "actors_died": 1,
        "learner_restarts": 0,
        "ledger": {"trained": 96, "pending": 4},
        "metrics": {"reward/mean": 0.25},
    }
    return RunStatus(**{**usual, **known})


async def test_who_asks_gets_what_the_driver_posted_last():
    box = Mailbox()
    asked = asyncio.create_task(box.ask())
    await asyncio.sleep(0)
    await box.exchange(status(step=3), {})
    assert (await asked).step == 3
    await box.exchange(status(step=4), {})
    later = await box.ask()
    assert later.step == 4
    assert 0 <= later.seconds_old < 5


async def test_an_order_goes_to_the_driver_once_and_its_answer_to_who_gave_it():
    box = Mailbox()
    first, second = (asyncio.create_task(box.scale(size)) for size in (3, 2))
    await asyncio.sleep(0)
    orders = await box.exchange(status(), {})
    assert [order.size for order in orders] == [3, 2]
    assert await box.exchange(status(), {}) == []
    await box.exchange(status(), {order.number: Answer(accepted=True, text=f"{order.size}") for order in orders})
    assert [(await first).text, (await second).text] == ["3", "2"]


async def test_an_order_that_nobody_waits_for_any_more_is_not_carried_out(monkeypatch):
    monkeypatch.setattr(mailbox, "ANSWER_SECONDS", 0.01)
    box = Mailbox()
    with pytest.raises(DeadlineExceeded, match=r"the run's driver to take the order.*; the order is withdrawn$"):
        await box.scale(3)
    assert await box.exchange(status(), {}) == []


async def test_an_answer_that_comes_too_late_is_dropped_and_its_order_may_be_carried_out(monkeypatch):
    monkeypatch.setattr(mailbox, "ANSWER_SECONDS", 0.01)
    box = Mailbox()
    ordered = asyncio.create_task(box.scale(3))
    await asyncio.sleep(0)
    (order,) = await box.exchange(status(), {})
    with pytest.raises(DeadlineExceeded, match=r"; the order may still be carried out; see ray-rl status$"):
        await ordered
    assert await box.exchange(status(), {order.number: Answer(accepted=True, text="late")}) == []


def test_a_person_reads_the_whole_status():
    lines = "\n".join(status_lines(status()))
    for part in ("step 3 of 12", "training; last step 1 min 15 s ago", "reward/mean 0.25", "pending 4", "1 died"):
        assert part in lines
    assert "rollout actor 0  serving, 4 groups in flight, 96 served" in lines
    assert "has said nothing" not in lines


def test_a_driver_that_is_silent_is_told_of():
    assert any("has said nothing for 30.0 s" in line for line in status_lines(status(seconds_old=30.0)))
