"""The process of one tracker: messages of `ray_rl.trackers` in, a library's calls out. ``python -m ray_rl.tracker_process``.

The first message says which tracker and whose run; each further one has the metrics of a step. When no more come it sends what
it has, and ends. What keeps it from working is one line on its standard output, and in its log with all details.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ray_rl.run_logs import inherit_log

logger = logging.getLogger("ray_rl.tracker_process")

_END_SECONDS = 120.0
"""For what is left to send when the driver is dead."""
_LOOK_SECONDS = 1.0
_PARAMETERS = 90
"""MLflow takes up to 100 at once."""

Log = Callable[[int, Mapping[str, float]], None]


@contextmanager
def _wandb(start: Mapping[str, Any]) -> Iterator[Log]:
    import wandb

    options, folder = start["options"], Path(start["folder"], "trackers")
    place = {"project": options["project"], "entity": options["entity"]}
    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    with wandb.init(
        **place,
        name=options["name"] or Path(start["folder"]).name,
        tags=options["tags"],
        id=_known(start, place) or _remember(start, place, uuid.uuid4().hex[:12]),
        resume="allow",
        mode="offline" if options["offline"] else None,
        dir=str(folder),
        config=start["config"],
        settings=settings,
    ) as run:
        # By our own number: wandb's never goes back, and steps may be done again.
        run.define_metric("*", step_metric="step")
        yield lambda step, metrics: run.log({"step": step, **metrics})


@contextmanager
def _trackio(start: Mapping[str, Any]) -> Iterator[Log]:
    import trackio

    options = start["options"]
    trackio.init(
        project=options["project"],
        name=options["name"] or Path(start["folder"]).name,
        space_id=options["space_id"],
        config=start["config"],
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    yield lambda step, metrics: trackio.log(dict(metrics), step=step)
    trackio.finish()


@contextmanager
def _mlflow(start: Mapping[str, Any]) -> Iterator[Log]:
    import mlflow

    options = start["options"]
    place = {"project": options["project"], "tracking_uri": options["tracking_uri"]}
    if options["tracking_uri"]:
        mlflow.set_tracking_uri(options["tracking_uri"])
    mlflow.set_experiment(options["project"])
    known = _known(start, place)
    tags = dict(tag.partition("=")[::2] for tag in options["tags"])
    with mlflow.start_run(run_id=known, run_name=options["name"] or Path(start["folder"]).name, tags=tags) as run:
        if known is None:
            _remember(start, place, run.info.run_id)
            parameters = list(_flat("", start["config"]))
            for first in range(0, len(parameters), _PARAMETERS):
                mlflow.log_params(dict(parameters[first : first + _PARAMETERS]))
        yield lambda step, metrics: mlflow.log_metrics(
            {name.replace("@", "_at_"): value for name, value in metrics.items()}, step=step
        )


OPEN = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
"""Kind -> its run, from the first message."""


def main() -> None:
    """Read messages to their end. Exit code 1: the tracker does not work."""
    # Who stops a job (`ray job stop`) signals all processes below the driver, whose last metrics are still to come.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_outlive, args=(os.getppid(),), name="driver-watch", daemon=True).start()
    messages, reasons = _take_streams()
    inherit_log("mlflow", shown=False)
    try:
        start = json.loads(next(messages))
        with OPEN[start["options"]["kind"]](start) as log:
            for line in messages:
                message = json.loads(line)
                log(message["step"], message["metrics"])
    # Whatever a library raises ends this process, and nothing but this process.
    except Exception as error:
        logger.exception("the tracker does not work")
        reasons.write(" ".join(f"{type(error).__name__}: {error}".split()))
        reasons.close()
        sys.exit(1)


def _outlive(driver: int) -> None:
    """End in time after the driver did, also where a library hangs; a living driver ends this process itself."""
    while os.getppid() == driver:
        time.sleep(_LOOK_SECONDS)
    time.sleep(_END_SECONDS)
    os._exit(1)


def _take_streams() -> tuple[Iterator[str], IO[str]]:
    """The driver's messages and where to answer, out of reach of a library, which may read, print, or start processes."""
    messages = os.fdopen(os.dup(0), encoding="utf-8")
    reasons = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.stdout = sys.stderr = _Printed()
    return iter(messages), reasons


class _Printed(io.TextIOBase):
    """What a library prints, as lines of the log."""

    def write(self, text: str) -> int:
        """Log it, unless it is blank."""
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)


def _state(start: Mapping[str, Any]) -> Path:
    return Path(start["folder"], "trackers", f"{start['name']}.json")


def _known(start: Mapping[str, Any], place: Mapping[str, Any]) -> str | None:
    """The tracker's own name of the run, from an earlier sitting that logged to the same place."""
    if not _state(start).exists():
        return None
    known = json.loads(_state(start).read_text())
    return known["id"] if known["place"] == place else None


def _remember(start: Mapping[str, Any], place: Mapping[str, Any], identity: str) -> str:
    path = _state(start)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"id": identity, "place": place}) + "\n")
    return identity


def _flat(prefix: str, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`section.key` -> value."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", str(value)


if __name__ == "__main__":
    main()
