"""What a run was, in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPORT_FILE = "report.json"
"""In the run's folder; the last file that a sitting writes."""


@dataclass(slots=True, kw_only=True)
class RunReport:
    """Filled while a run goes on; printed and written to report.json at its end."""

    name: str
    folder: str
    steps: int = 0
    """Steps done, in all sittings of the run."""
    interrupted: bool = False
    evaluation_before: Mapping[str, float] = field(default_factory=dict)
    evaluation_after: Mapping[str, float] = field(default_factory=dict)
    primary_tokens: int = 0
    """Tokens of completions generated for training, in this sitting."""
    continuation_tokens: int = 0
    dropped_groups: dict[str, int] = field(default_factory=dict)
    """Reason (stale, decided) -> groups sampled but not trained on, in this sitting. Their tokens are counted above."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds, in this sitting."""
    startup: Mapping[str, float] = field(default_factory=dict)
    """As `Startup.metrics`, of this sitting."""
    peak_bytes: int = 0
    next_steps: list[str] = field(default_factory=list)

    def spend(self, phase: str, seconds: float) -> None:
        """Add to the time of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def is_complete(folder: Path, steps: int) -> bool:
    """Whether the last sitting of the run in a folder came to its end, after so many steps or more."""
    try:
        found = json.loads((folder / REPORT_FILE).read_text())
        return not found["interrupted"] and int(found["steps"]) >= steps
    except (OSError, ValueError, TypeError, KeyError):
        return False  # no sitting has ended in order, or the file is damaged: to go on makes it anew
