"""`ray-rl status` as text."""

from __future__ import annotations

from collections.abc import Iterator

from ray_rl.mailbox import RunStatus

_OLD_SECONDS = 5.0
"""A driver that has said nothing for so long is busy or stuck."""


def status_lines(status: RunStatus) -> Iterator[str]:
    """What a person wants to know of a run in progress."""
    yield f"{status.name}: step {status.step} of {status.steps}, policy version {status.policy_version}"
    yield f"doing      {status.phase}; last step {_duration(status.seconds_since_step)} ago"
    if status.seconds_old > _OLD_SECONDS:
        yield f"warning    the driver has said nothing for {_duration(status.seconds_old)}; this is how it was then"
    if status.metrics:
        yield "last step  " + ", ".join(f"{name} {value:.4g}" for name, value in status.metrics.items())
    yield f"buffer     {status.buffer_depth} finished groups wait for the learner"
    if status.ledger:
        yield "prompts    " + ", ".join(f"{outcome} {count}" for outcome, count in status.ledger.items())
    yield (
        f"actors     {status.actors_wanted} wanted, {len(status.actors)} there, {status.actors_died} died; learner restarted "
        f"{status.learner_restarts} times"
    )
    width = max((len(actor.name) for actor in status.actors), default=0)
    for actor in status.actors:
        yield f"  {actor.name:{width}}  {actor.state}, {actor.groups} groups in flight, {actor.served} served"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
