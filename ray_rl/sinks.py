"""Where metrics go: a JSONL file always, TensorBoard if wanted. Neither imports torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ray_rl.config.orchestration import LoggingConfig


class MetricSink(Protocol):
    """Takes one flat mapping of metrics a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a step. Steps don't descend; the same step again adds to it."""

    def close(self) -> None:
        """Write what is pending; nothing may be logged afterwards."""


def make_sink(folder: Path, config: LoggingConfig, *, resume_step: int = 0) -> MetricSink:
    """The sinks of a run: ``metrics.jsonl`` and, if configured, TensorBoard events in ``tensorboard/``.

    Args:
        folder: the run folder.
        config: which sinks.
        resume_step: the step that the run goes on from; what an earlier sitting logged after it is taken back.
    """
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl", resume_step=resume_step)]
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard", resume_step=resume_step))
    return ManySinks(sinks)


class ManySinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to each."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close each."""
        for sink in self._sinks:
            sink.close()


class JsonlSink:
    """One object a step, ``{"step": 3, "reward/mean": 0.5, ...}``, on disk as soon as it is logged.

    JSON knows no nan or infinity: they become null.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """Open or go on; lines of steps after `resume_step`, and a line that was cut short, are removed."""
        cut_after_step(path, resume_step)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._last: dict[str, float | int | None] = json.loads(lines[-1]) if lines else {}
        self._file = path.open("ab")
        self._last_offset = sum(len(line) for line in lines[:-1])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line, or rewrite the last one with the metrics added when it is of the same step."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if self._last.get("step") == step:
            self._last |= values
            self._file.truncate(self._last_offset)
        else:
            self._last = {"step": step, **values}
            self._last_offset = self._file.seek(0, 2)
        self._file.write(json.dumps(self._last).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_after_step(path: Path, step: int) -> None:
    """Cut a JSONL file, whose objects carry ascending ``step``, before the first line that is later or broken.

    An interrupted run may have written steps that its last checkpoint does not hold; the resumed run makes them again.
    """
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            if not _is_kept(line, step):
                break
            kept += len(line)
        file.truncate(kept)


def logged_metrics(path: Path, step: int) -> dict[str, float]:
    """What `JsonlSink` has of a step; empty when it has nothing. Metrics without a finite value are left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, float | None] = next((row for row in map(json.loads, lines) if row["step"] == step), {})
    return {name: value for name, value in found.items() if name != "step" and value is not None}


def _is_kept(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError):
        return False


class TensorBoardSink:
    """Scalars as TensorBoard events, by TensorBoard's own writer."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        """Start an events file; TensorBoard hides what an earlier one holds after `resume_step`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        if resume_step:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and end the writer's thread."""
        self._writer.close()
