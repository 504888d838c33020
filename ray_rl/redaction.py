"""Keeps secrets out of what a run writes: logs, recipes, records, trackers. They come from the environment alone.

A secret is the value of an environment variable whose name says so (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD), and
the password in a URL. Text is masked. A recipe, which a resumed run reads again and so cannot be masked, is refused.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ray_rl.errors import ConfigError

MASK = "[secret]"
_SHORTEST = 8
"""Characters. What is shorter guards nothing, and masking it would hide words."""
_VARIABLE = re.compile(
    r"(^|_)(TOKEN|(API|ACCESS|PRIVATE|SECRET)?KEY|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEYS"
    r"|CONNECTION_?STRING|MYSQL_PWD)(_|$)|_(PASS|PAT)$"
)
_PLACE = re.compile(r"_(PATH|FILE|DIR|MODE)$")
"""Ends the name of a variable that tells where a secret lies, or how it is used."""
_OPTION = re.compile(
    r"(^|[_.-])(password|passwd|passphrase|secret|credentials?|(api|access|private|secret)_?key"
    r"|(auth|access|api|bearer|hf|hub|refresh|secret|security|session)_?token)$|^token$",
    re.IGNORECASE,
)
"""Ends the name of an option that holds one; `pad_token` and `max_tokens` do not."""
_IN_URL = re.compile(
    r"(?P<before>\b[a-z][a-z0-9+.-]*://)[^/\s:@]*:(?:[^/\s?#]+|(?!\d+[/?#])[^\s@]+)(?=@)", re.IGNORECASE
)
"""Up to the last @ before the path, for a password may hold one; or up to the first, if what looks like a path is no port's."""
_IN_QUERY = re.compile(
    r"(?P<before>[?&](?:[a-z-]*signature|sig|(?:access_)?token|api_?key|secret|password)=)[^&\s\"']+", re.IGNORECASE
)


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The secrets of an environment, this process's if none is given: value -> name of its variable, the longest first.

    Of a value of several lines, as of a private key, each line is one.
    """
    variables = os.environ if environment is None else environment
    named = (
        item for item in variables.items() if _VARIABLE.search(item[0].upper()) and not _PLACE.search(item[0].upper())
    )
    found = {line.strip(): name for name, value in named for line in value.splitlines()}
    return {value: found[value] for value in sorted(found, key=len, reverse=True) if len(value) >= _SHORTEST}


def redact(text: str) -> str:
    """The text without secrets."""
    for value in secrets():
        text = text.replace(value, MASK)
    for pattern in (_IN_URL, _IN_QUERY):
        text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


def redacted(data: Any) -> Any:
    """A copy of plain data without secrets, at any depth."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, Mapping):
        return {key: MASK if _is_secret(key, value) else redacted(value) for key, value in data.items()}
    return [redacted(value) for value in data] if isinstance(data, list | tuple) else data


def refuse_secrets(recipe: Mapping[str, Any]) -> None:
    """Whether a recipe can be written down. The message tells where the secret stands, not what it is.

    Raises:
        ConfigError: it holds secrets.
    """
    if faults := list(_faults((), recipe, secrets())):
        raise ConfigError("\n".join(faults))


class RedactingFormatter(logging.Formatter):
    """Formats records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return redact(super().format(record))


def _faults(path: tuple[str, ...], value: Any, known: Mapping[str, str]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if _is_secret(key, inner):
                yield _fault((*path, key), "is called like a secret")
            else:
                yield from _faults((*path, key), inner, known)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _faults((*path, str(index)), inner, known)
    elif isinstance(value, str):
        variable = next((name for secret, name in known.items() if secret in value), None)
        if variable is not None:
            yield _fault(path, f"holds the value of {variable}")
        elif _IN_URL.search(value) or _IN_QUERY.search(value):
            yield _fault(path, "holds a password in a URL")


def _fault(path: tuple[str, ...], what: str) -> str:
    return (
        f"{'.'.join(path)}: {what}, and a recipe lies open in the run's folder and goes to trackers; "
        "leave it out and set it in the environment"
    )


def _is_secret(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and bool(_OPTION.search(key))
