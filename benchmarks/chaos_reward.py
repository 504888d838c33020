"""A grader for runs that are to have a reward actor: the answer after the last `#`, as the built-in `exact` finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(prompt: str, completion: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 for the right answer."""
    return float("#" in completion and completion.rpartition("#")[2].split("\n")[0].strip() == answer)
