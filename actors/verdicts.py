"""What a grader process answers, and how it travels: as JSON, because what a user's process pickles can't be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ray_rl.types import Reward

_SHOWN_CHARACTERS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The grader raised something instead of answering."""

    reason: str
    """What precedes a colon names the kind of failure, by which they are counted."""
    spent: bool = False
    """Whether its process is of no more use."""


Answer = Reward | str | Failed
"""A reward for an item, a final answer for a text."""


def pack(answer: Answer) -> bytes:
    """An answer as a message; `unpack` reads it."""
    match answer:
        case Reward():
            said: Any = {"value": answer.value, "parts": dict(answer.parts), "failure": answer.failure}
        case Failed():
            said = {"failed": answer.reason, "spent": answer.spent}
        case _:
            said = {"text": answer}
    return json.dumps(said).encode()


def unpack(message: bytes) -> Answer:
    """The answer in a message; a reward's numbers are finite.

    Raises:
        ValueError: the message is none of `pack`'s.
    """
    try:
        said = json.loads(message)
    except RecursionError as error:
        raise ValueError("nested without end") from error
    match said:
        case {"value": float(value), "parts": dict(parts), "failure": None | str() as failure}:
            if not all(isinstance(number, float) and math.isfinite(number) for number in (value, *parts.values())):
                raise ValueError("a reward that is not made of finite numbers")
            return Reward(value=value, parts=parts, failure=failure)
        case {"failed": str(reason), "spent": bool(spent)}:
            return Failed(reason=reason, spent=spent)
        case {"text": str(text)}:
            return text
    raise ValueError(shortened(repr(said)))


def shortened(text: str) -> str:
    """The text, without its middle when it is long: for logs and reasons."""
    half = _SHOWN_CHARACTERS // 2
    cut = len(text) - 2 * half
    return text if cut <= 0 else f"{text[:half]} [... {cut} characters ...] {text[-half:]}"
