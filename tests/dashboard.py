"""deploy/grafana/ as data, and the names of metrics in PromQL."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PROMETHEUS = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())


def expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard, those of its variables too."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable)


def metric_names(texts: Iterable[str]) -> set[str]:
    """What stands before a selector, or alone, and is no function or keyword."""
    return {name for text in texts for name in re.findall(r"\bray_\w+", text)}
