"""The job server of a Ray cluster: submit a job, follow it to its end. Ray is imported where it is needed.

An error is one line, and comes within seconds where nobody answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ray_rl.deadlines import Deadline, call_within, first_of, in_thread
from ray_rl.errors import ConfigError, RunError
from ray_rl.job_log import JobLog
from ray_rl.placement import knock
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_KNOCK_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_UPLOAD_SECONDS = 600.0
_QUIET_SECONDS = 10.0
"""Without a line, after which the server is asked about the job: a connection that died may never say so."""
_PAUSE_SECONDS = 2.0
_LOST_SECONDS = 300.0
"""In which a server that cannot be reached any more must be back, as after a restart, or a tunnel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """Of its command; None where that did not come to its end."""
    message: str
    """Ray's, on one line."""


class JobServer:
    """A job server that answered."""

    def __init__(self, address: str, client: JobSubmissionClient) -> None:
        """See `connect`."""
        self.address = address
        self._client = client

    @classmethod
    def connect(cls, address: str) -> JobServer:
        """Find out whether there is a job server that lets us in.

        Args:
            address: http://HOST:PORT.

        Raises:
            ConfigError: there is not.
        """
        address = address.rstrip("/")
        try:
            knock(_host_and_port(address), _KNOCK_SECONDS)
        except OSError as error:
            raise ConfigError(
                f"--address: no job server answers at {address}: {one_line(error)}; start the cluster, or forward the port of "
                "its head node to here (8265)"
            ) from error
        os.environ[ADDRESS_VARIABLE] = address  # Ray lets this and RAY_ADDRESS win over what it is told
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            client = call_within(
                lambda: JobSubmissionClient(address), _ANSWER_SECONDS, what=f"the job server at {address} to answer"
            )
        except _faults() as error:
            raise ConfigError(
                f"--address: {address} is no job server that lets this process in: {one_line(error)}; name Ray's dashboard, "
                "and where it asks for a token set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        return cls(address, client)

    def submit(
        self, entrypoint: str, *, folder: Path, environment: Mapping[str, str], submission_id: str | None
    ) -> str:
        """Send the working folder, unless the cluster has it, and start a job in it.

        Args:
            entrypoint: a shell command.
            folder: what is not ignored in it arrives.
            environment: of the job and its actors; whoever may look at jobs can read it.
            submission_id: of the job; None: Ray makes one.

        Returns:
            The submission id.

        Raises:
            ConfigError: the server refuses.
            DeadlineExceeded: it takes too long.
        """
        runtime_env = {"working_dir": str(folder), "env_vars": dict(environment)}
        try:
            return call_within(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=runtime_env, submission_id=submission_id
                ),
                _UPLOAD_SECONDS,
                what=f"the job server at {self.address} to take the working folder and the job",
            )
        except _faults() as error:
            if isinstance(error, RunError):
                raise
            raise ConfigError(f"submit: {self.address} refuses the job: {_last_line(error)}") from error

    def follow(self, submission_id: str, log: JobLog) -> JobEnd:
        """Read a job's log until the job has ended; a lost connection is begun anew.

        Raises:
            RunError: the server cannot be reached any more.
        """
        details = asyncio.run(self._follow(submission_id, log))
        log.end()
        return JobEnd(
            status=str(details.status), exit_code=details.driver_exit_code, message=_first_line(details.message or "")
        )

    async def _follow(self, submission_id: str, log: JobLog) -> JobDetails:
        lost: Deadline | None = None

        def heard() -> None:
            nonlocal lost
            lost = None

        while True:
            try:
                await self._read(submission_id, log, heard)
                details = await self._details(submission_id)
            except _faults() as error:
                lost = lost or Deadline(
                    _LOST_SECONDS,
                    what=f"the job server at {self.address} to answer again",
                    causes=f"{one_line(error)}; the job may go on all the same",
                )
                lost.check()
            else:
                heard()
                if details.status.is_terminal():
                    return details
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _read(self, submission_id: str, log: JobLog, heard: Callable[[], None]) -> None:
        """One connection, until the server ends it. `heard` is called for what is new: a proxy may cut all that last long."""
        pieces = self._client.tail_job_logs(submission_id)
        log.begin_anew()
        while True:
            piece = asyncio.ensure_future(anext(pieces))
            has_ended = False
            try:
                while not await first_of([piece], _QUIET_SECONDS):
                    if has_ended:
                        return
                    has_ended = (await self._details(submission_id)).status.is_terminal()
                    if not has_ended:
                        heard()
                if log.take(piece.result()):
                    heard()
            except StopAsyncIteration:
                return
            finally:
                piece.cancel()

    async def _details(self, submission_id: str) -> JobDetails:
        return await in_thread(
            lambda: self._client.get_job_info(submission_id),
            _ANSWER_SECONDS,
            what=f"the job server at {self.address} to tell of the job",
        )


def _host_and_port(address: str) -> str:
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    if "@" in address:
        raise ConfigError(
            "--address: no place for a password, since it is shown; use Ray's tokens (RAY_AUTH_TOKEN), or a tunnel"
        )
    if port is None or not parts.hostname:
        raise ConfigError(f"--address: {address} is no address of a job server; write http://HOST:8265")
    return f"{parts.hostname}:{port}"


def _faults() -> tuple[type[Exception], ...]:
    """What Ray's client raises; an answer that it cannot read is a ValueError or a KeyError."""
    import aiohttp
    from ray.exceptions import RayError

    return (OSError, RuntimeError, ValueError, KeyError, RayError, aiohttp.ClientError)


def _first_line(text: str) -> str:
    """Without the end of the log, which Ray adds to it."""
    return (text.splitlines() or [""])[0].partition(", last available logs")[0]


def _last_line(error: BaseException) -> str:
    """Of a server's traceback, the error; it stands last."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip() if len(lines) > 1 else one_line(error)
