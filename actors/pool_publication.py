"""One policy version on its way into the members of a pool: handed over, then proven."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.pool_member import Member
from ray_rl.protocols import MakeWeights, PublishedWeights
from ray_rl.weight_manifest import Probe

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A version, and what became of it in the members that were there."""

    weights: PublishedWeights
    probe: Probe
    pauses: Mapping[Member, float]
    """Of those that received it: seconds in which their engines sampled nothing."""
    differences: Mapping[Member, float]
    """Of those that proved it: largest difference of a log-probability."""
    failures: Mapping[Member, BaseException]
    """Of those that did not."""


async def publish_to(members: Sequence[Member], make: MakeWeights, seconds: float) -> Publication:
    """Make a version and bring it into all of them side by side.

    Args:
        members: have loaded their engines.
        make: makes the weights; its errors, and its probe's, come as they are.
        seconds: for each to receive, and again to prove.
    """
    weights = await make([member.client.receiver for member in members])
    pauses, lost = await of_each(members, lambda member: _receive(member, weights, seconds))
    # Also where nobody has them: it tells whether the reason is that the learner is gone.
    probe = await weights.probe()
    differences, unproven = await of_each(pauses, lambda member: _prove(member, probe, seconds))
    return Publication(
        weights=weights, probe=probe, pauses=pauses, differences=differences, failures={**lost, **unproven}
    )


async def hand_over(member: Member, publication: Publication, seconds: float) -> None:
    """Bring a member that joins to a version that others have proven; raises what keeps it from that."""
    await _receive(member, publication.weights, seconds)
    await _prove(member, publication.probe, seconds)


async def take_occupancy(members: Iterable[Member], seconds: float) -> dict[str, float]:
    """How well engines were used since the last call, averaged over those that answer.

    Returns:
        `timing/engines_idle`: seconds without any work; `timing/engines_underfull`: seconds with requests for less than half a
        batch although more groups may have waited.
    """
    what = "to tell how full its engine was"
    underfull, _ = await of_each(
        members,
        lambda member: member.call(lambda client: client.take_underfull(), seconds, what=f"{member.name} {what}"),
    )
    count = max(1, len(underfull))
    return {
        "timing/engines_idle": sum(member.take_idle() for member in underfull) / count,
        "timing/engines_underfull": sum(underfull.values()) / count,
    }


async def of_each(
    members: Iterable[Member], call: Callable[[Member], Coroutine[Any, Any, T]]
) -> tuple[dict[Member, T], dict[Member, BaseException]]:
    """Answers and errors of calls that run side by side, each with a deadline of its own."""
    asked = list(members)
    results = await asyncio.gather(*(call(member) for member in asked), return_exceptions=True)
    answers: dict[Member, T] = {}
    errors: dict[Member, BaseException] = {}
    for member, result in zip(asked, results, strict=True):
        if isinstance(result, BaseException):
            errors[member] = result
        else:
            answers[member] = result
    return answers, errors


async def _receive(member: Member, weights: PublishedWeights, seconds: float) -> float:
    what = f"policy version {weights.version} to reach {member.name}"
    return await member.call(lambda client: client.receive_weights(weights), seconds, what=what)


async def _prove(member: Member, probe: Probe, seconds: float) -> float:
    what = f"{member.name} to prove its weights"
    return await member.call(lambda client: client.prove_weights(probe), seconds, what=what)
