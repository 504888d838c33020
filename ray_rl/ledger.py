"""Where each prompt of the stream ended: trained on in a step, dropped for a reason, or pending. Exactly one of these.

`ledger.jsonl` in the run folder has a line for each training step:

    {"step": 3, "trained": [8, 9, 11], "dropped": {"stale": [4]}}

`dropped` are the positions that were dropped after the step before. The file is the whole record; a checkpoint's `RunState` has
the pending positions and the totals at the end of its step. What happened after the last checkpoint is undone when the run goes
on from there: those positions are pending again.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ray_rl.checkpoints import RunState
from ray_rl.errors import RunError, writing
from ray_rl.sinks import cut_after_step, parse_line, write_line


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLine:
    """What ended with one training step. Positions ascend."""

    step: int
    trained: tuple[int, ...]
    """Positions trained on in the step."""
    dropped: Mapping[str, tuple[int, ...]]
    """Reason -> positions dropped for it since the step before."""


class Ledger:
    """The book of a run. In memory are the pending positions and counts, however long the run is."""

    def __init__(self, path: Path, start: RunState) -> None:
        """Open it at the state that the run starts from, which the file then fits.

        Lines of later steps are cut, and what follows a broken line. Where lines of earlier steps are lost, the totals are
        those of the state, and `note` says so.

        Args:
            path: of the file, which may be missing.
            start: of a checkpoint, or of a new run.

        Raises:
            NotWritten: the system refused to cut it.
        """
        cut_after_step(path, start.step, is_whole=_is_line)
        self._path = path
        self._step = start.step
        self._drawn = start.position
        self._pending = set(start.pending_positions)
        self._since: dict[int, str] = {}
        """Position -> reason, of what was dropped after the last line."""
        self._trained, self._dropped = _count(read_ledger(path))
        self.note: str | None = None
        """For the user: what the file lacks."""
        ended = start.position - len(self._pending)
        known = self._trained + self._dropped.total()
        if known != ended:
            self.note = (
                f"{path}: says how {known} of the {ended} prompts before step {start.step} ended; the totals go on from the "
                "checkpoint's"
            )
            self._trained, self._dropped = start.trained, Counter(start.dropped)

    @property
    def pending(self) -> frozenset[int]:
        """Positions that were drawn and have not ended."""
        return frozenset(self._pending)

    def totals(self) -> dict[str, float]:
        """Metrics of all that happened by now: they add up to the number of prompts drawn."""
        dropped = self._dropped + Counter(self._since.values())
        return {
            "ledger/trained": float(self._trained),
            "ledger/dropped": float(dropped.total()),
            **{f"ledger/dropped_{reason}": float(count) for reason, count in sorted(dropped.items())},
            "ledger/pending": float(len(self._pending)),
        }

    def draw(self, position: int) -> None:
        """The prompt is on its way: the next one of the stream, or a pending one once more.

        Raises:
            ValueError: it has ended already, or the stream left some out.
        """
        if position == self._drawn:
            self._drawn += 1
            self._pending.add(position)
        else:
            self._require_pending(position, "drawn")

    def drop(self, position: int, reason: str) -> None:
        """The prompt ends without training.

        Args:
            position: of a pending prompt.
            reason: one word: stale, decided, failed.

        Raises:
            ValueError: it was never drawn, or has ended already.
        """
        self._require_pending(position, f"dropped ({reason})")
        self._pending.remove(position)
        self._since[position] = reason

    def train(self, step: int, positions: Sequence[int]) -> None:
        """A step is done: its prompts end, and its line is written with what was dropped since the line before.

        Args:
            step: one more than the step before.
            positions: of the prompts trained on; none where there was nothing to train on.

        Raises:
            ValueError: another step is due, or a position was never drawn, has ended already or is there twice.
            NotWritten: the system refused; nothing has changed.
        """
        if step != self._step + 1:
            raise ValueError(f"step {step}: trained after step {self._step}")
        for position, times in Counter(positions).items():
            self._require_pending(position, f"trained in step {step}")
            if times > 1:
                raise ValueError(f"position {position}: trained in step {step}, {times} times")
        dropped: dict[str, list[int]] = defaultdict(list)
        for position, reason in sorted(self._since.items()):
            dropped[reason].append(position)
        write_line(self._path, {"step": step, "trained": sorted(positions), "dropped": dropped})
        self._step = step
        self._pending.difference_update(positions)
        self._trained += len(positions)
        self._dropped.update(self._since.values())
        self._since = {}

    def undo(self, step: int) -> tuple[int, ...]:
        """Back to the end of a step: what ended after it is pending again, and later lines are removed.

        Args:
            step: at most the last one.

        Returns:
            The positions that became pending, ascending.

        Raises:
            RunError: lines of the steps to undo are missing.
            NotWritten: the system refused to cut the file.
        """
        lines = [line for line in read_ledger(self._path) if line.step > step]
        if [line.step for line in lines] != list(range(step + 1, self._step + 1)):
            raise RunError(
                f"{self._path}: cannot go back from step {self._step} to step {step}, for lines between them are missing; "
                "train --resume goes on without them"
            )
        cut_after_step(self._path, step, is_whole=_is_line)
        trained, dropped = _count(lines)
        self._trained -= trained
        self._dropped -= dropped
        again = {*self._since, *chain.from_iterable(map(_ended, lines))}
        self._pending |= again
        self._since = {}
        self._step = min(step, self._step)
        return tuple(sorted(again))

    def state(self, step: int, position: int, seed: int) -> RunState:
        """The state of the run at the end of the last step; the file is on the disk when this returns.

        What was dropped after that step is pending there: a run that goes on from it samples those prompts again.

        Args:
            step: the last one.
            position: of the prompt stream.
            seed: of the run.

        Raises:
            ValueError: the stream handed out more prompts than were drawn here.
            RunError: the step has no line.
            NotWritten: the system refused.
        """
        if position != self._drawn:
            raise ValueError(f"the stream is at position {position}, the ledger at {self._drawn}")
        if step != self._step:
            raise RunError(
                f"{self._path}: step {step} cannot be saved: the last one that is written down is {self._step}"
            )
        if self._path.exists():
            with writing(self._path), self._path.open("rb") as file:
                os.fsync(file.fileno())
        return RunState(
            step=step,
            policy_version=step,
            position=position,
            pending_positions=tuple(sorted({*self._pending, *self._since})),
            seed=seed,
            trained=self._trained,
            dropped=dict(sorted(self._dropped.items())),
        )

    def _require_pending(self, position: int, end: str) -> None:
        if position not in self._pending:
            raise ValueError(f"position {position}: {end}, but it {self._fate(position)}")

    def _fate(self, position: int) -> str:
        if position in self._since:
            return f"was dropped ({self._since[position]}) after step {self._step}"
        if not 0 <= position < self._drawn:
            return f"was never handed out: the next position is {self._drawn}"
        for line in read_ledger(self._path):
            if position in line.trained:
                return f"was trained in step {line.step}"
            for reason, positions in line.dropped.items():
                if position in positions:
                    return f"was dropped ({reason}) before the end of step {line.step}"
        return "ended in a step whose line is lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerAudit:
    """Whether each position that a state's run has handed out is in exactly one place."""

    trained: int
    """Positions in lines up to the state's step."""
    dropped: Mapping[str, int]
    """Reason -> positions, likewise."""
    pending: int
    """Positions in the state."""
    lost: tuple[int, ...]
    """Handed out, but in no place, ascending. Those of lines that an accident took are among them."""
    duplicated: tuple[int, ...]
    """In more than one place, or in one without having been handed out, ascending."""


def audit(path: Path, state: RunState) -> LedgerAudit:
    """Compare a ledger's file with the state of a checkpoint, or of a run at its end.

    Args:
        path: of the file.
        state: lines after its step don't count: a run that goes on from it takes them back.
    """
    lines = [line for line in read_ledger(path) if line.step <= state.step]
    trained, dropped = _count(lines)
    places = Counter(chain(state.pending_positions, chain.from_iterable(map(_ended, lines))))
    handed_out = range(state.position)
    return LedgerAudit(
        trained=trained,
        dropped=dropped,
        pending=len(state.pending_positions),
        lost=tuple(position for position in handed_out if position not in places),
        duplicated=tuple(sorted(p for p, times in places.items() if times > 1 or p not in handed_out)),
    )


def read_ledger(path: Path) -> Iterator[LedgerLine]:
    """The lines of a ledger's file, up to the first broken one; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            row = parse_line(text)
            if row is None or not _is_line(row):
                return
            dropped = {reason: tuple(positions) for reason, positions in row["dropped"].items()}
            yield LedgerLine(step=row["step"], trained=tuple(row["trained"]), dropped=dropped)


def _is_line(row: Mapping[str, Any]) -> bool:
    trained, dropped = row.get("trained"), row.get("dropped")
    return isinstance(dropped, dict) and all(map(_are_positions, (trained, *dropped.values())))


def _are_positions(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(position, int) for position in value)


def _ended(line: LedgerLine) -> Iterator[int]:
    return chain(line.trained, *line.dropped.values())


def _count(lines: Iterator[LedgerLine] | Sequence[LedgerLine]) -> tuple[int, Counter[str]]:
    """Positions trained on, and reason -> positions dropped."""
    trained, dropped = 0, Counter[str]()
    for line in lines:
        trained += len(line.trained)
        dropped.update({reason: len(positions) for reason, positions in line.dropped.items()})
    return trained, dropped
