"""Where metrics go: a JSONL file always, TensorBoard if wanted. Neither imports torch.

And the one way to write the run's JSONL files (metrics, groups, ledger): a line is there whole or not at all, every object
carries its ``step``, which doesn't descend, and whatever an accident left behind, the good lines before it are kept.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from ray_rl.config.orchestration import LoggingConfig
from ray_rl.errors import writing


class MetricSink(Protocol):
    """Takes one flat mapping of metrics a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a step. Steps don't descend; the same step again adds to it.

        Raises:
            NotWritten: the system refused.
        """

    def rewind(self, step: int) -> None:
        """Take back what was logged after a step: the run does those steps again. Raises as `log` does."""

    def close(self) -> None:
        """Write what is pending; nothing may be logged afterwards."""


def make_sink(folder: Path, config: LoggingConfig, *, resume_step: int = 0) -> MetricSink:
    """The sinks of a run: ``metrics.jsonl`` and, if configured, TensorBoard events in ``tensorboard/``.

    Args:
        folder: the run folder.
        config: which sinks.
        resume_step: the step that the run goes on from; what an earlier sitting logged after it is taken back.

    Raises:
        NotWritten: the system refused.
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

    def rewind(self, step: int) -> None:
        """Rewind each."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close each, also when one of them cannot write its rest."""
        with ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)


class JsonlSink:
    """One object a step, ``{"step": 3, "reward/mean": 0.5, ...}``, in the file as soon as it is logged.

    JSON knows no nan or infinity: they become null.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """Begin or go on; lines of steps after `resume_step`, and whatever follows a broken line, are removed."""
        self._path = path
        self._last_begin, self._last = cut_after_step(path, resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line, or rewrite the last one with the metrics added when it is of the same step."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        again = self._last.get("step") == step
        row = {**self._last, **values} if again else {"step": step, **values}
        self._last_begin = write_line(self._path, row, at=self._last_begin if again else None)
        self._last = row

    def rewind(self, step: int) -> None:
        """Remove the lines of later steps."""
        self._last_begin, self._last = cut_after_step(self._path, step)

    def close(self) -> None:
        """Nothing is ever pending."""


def write_line(path: Path, row: Mapping[str, Any], *, at: int | None = None) -> int:
    """Append an object as a line: all of it or, where the system refuses, nothing.

    Args:
        path: of the file.
        row: the object.
        at: where a last line begins that this one replaces. None: it replaces none.

    Returns:
        Where the line begins.

    Raises:
        NotWritten: the system refused; the file is as it was.
        ValueError: a value that JSON does not know.
    """
    # Half of a surrogate pair, which a dataset may hold, has no bytes of its own; as an escape it is JSON.
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
    with writing(path), path.open("a+b", buffering=0) as file:
        begin = file.seek(0, os.SEEK_END)
        replaced = b""
        if at is not None and at < begin:
            begin = file.seek(at)
            replaced = file.read()
            file.truncate(begin)
        try:
            _write_all(file, line)
        except OSError:
            with suppress(OSError):  # a line that cannot be taken back either is cut at the next opening
                file.truncate(begin)
                _write_all(file, replaced)
            raise
    return begin


def _write_all(file: FileIO, data: bytes) -> None:
    """A disk that fills up takes a part without an error; the next attempt tells."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it was cut short or is no object with a step."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def cut_after_step(
    path: Path, step: int, *, is_whole: Callable[[Mapping[str, Any]], bool] | None = None
) -> tuple[int, dict[str, Any]]:
    """Cut a file of `write_line` before the first line that is later or broken.

    An interrupted run may have written steps that its last checkpoint does not hold; the resumed run makes them again.

    Args:
        path: of the file, which may be missing.
        step: the last one to keep.
        is_whole: what else an object must be so as not to count as broken.

    Returns:
        Where the last line that is left begins, and its object; 0 and an empty one where none is left.

    Raises:
        NotWritten: the system refused.
    """
    begin = end = 0
    last: dict[str, Any] = {}
    if path.exists():
        with writing(path), path.open("rb+") as file:
            for line in file:
                row = parse_line(line)
                if row is None or row["step"] > step or not (is_whole is None or is_whole(row)):
                    break
                begin, end, last = end, end + len(line), row
            file.truncate(end)
    return begin, last


def logged_metrics(path: Path, step: int) -> dict[str, float]:
    """What `JsonlSink` has of a step; empty when it has nothing. Metrics without a finite value are left out."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        rows = (row for row in map(parse_line, file) if row)
        found = next((row for row in rows if row["step"] == step), {})
    return {name: value for name, value in found.items() if name != "step" and isinstance(value, (int, float))}


class TensorBoardSink:
    """Scalars as TensorBoard events, in TensorBoard's own format.

    Its `EventFileWriter` writes in a thread, whose death on a full disk its user may wait for without end.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        """Start an events file; TensorBoard hides what an earlier one holds after `resume_step`."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(self._path.open("xb"))
        self._add(file_version="brain.Event:2")
        if resume_step:
            self.rewind(resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=Summary(value=values))

    def rewind(self, step: int) -> None:
        """Say that the steps after this one begin anew; TensorBoard then hides what it has of them."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._records.close()

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with writing(self._path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()
