"""Labels of nodes and what actors ask of them, in the syntax and with the meaning of Ray's label selectors.

value        the node's label is this                 in(a,b)     it is one of these
!value       it is not, or the node has no such label     !in(a,b)    it is none of these, or the node has none
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:[a-zA-Z0-9][a-zA-Z0-9_.-]{{0,252}}/)?{_WORD}")
_VALUE = re.compile(_WORD)
_BLANKS = re.compile(r"\s*([!(),])\s*")
_SELECTOR = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:,{_WORD})*\))")


def is_selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels will do for a selector that was checked."""
    return all(_holds(condition, labels.get(key)) for key, condition in selector.items())


def _holds(condition: str, label: str | None) -> bool:
    wanted = condition.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return (label in values) != condition.startswith("!")


def _checked_selector(given: dict[str, str]) -> dict[str, str]:
    """Without blanks between values: Ray takes them, but then means values that begin with one."""
    selector = {key: _BLANKS.sub(r"\1", condition.strip()) for key, condition in given.items()}
    for key, condition in selector.items():
        _check_key(key)
        if not _SELECTOR.fullmatch(condition):
            raise ValueError(f"{key}: {given[key]!r:.80} is no label selector; use value, !value, in(a,b) or !in(a,b)")
    return selector


def _checked_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        _check_key(key)
        if not _VALUE.fullmatch(value):
            raise ValueError(
                f"{key}: {value!r:.80} is no label's value; use up to 63 letters, digits and _.- between them"
            )
    return labels


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r:.80} is no label's name; use up to 63 letters, digits and _.- between them")


def _checked_resources(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in _RESERVED:
            raise ValueError(f"{name}: is no custom resource; use {_RESERVED[name]}")
        if not 0 < amount < float("inf"):
            raise ValueError(f"{name}: {amount:g} is no amount; use a positive number, or leave it out")
        if amount > 1 and amount != int(amount):
            raise ValueError(f"{name}: {amount:g}, but Ray takes only whole amounts above 1; use {int(amount)}")
    return resources


_RESERVED = {
    "CPU": "the option for CPUs",
    "GPU": "the option for GPUs",
    "memory": "labels to choose the machine",
    "object_store_memory": "ray.object_store_mib",
}
"""What has options of its own, or none."""

LabelSelector = Annotated[dict[str, str], AfterValidator(_checked_selector)]
"""What a node's labels must be."""
Labels = Annotated[dict[str, str], AfterValidator(_checked_labels)]
"""A node's labels."""
CustomResources = Annotated[dict[str, float], AfterValidator(_checked_resources)]
"""Amounts of a cluster's custom resources, by name."""
