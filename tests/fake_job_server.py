"""Ray's job server as far as its client goes: the protocol, without a cluster behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

_SECONDS = 20.0


@dataclass
class FakeJobServer:
    """One job's life, written beforehand."""

    log: list[str] = field(default_factory=lambda: ["hello\n"])
    """Pieces in which the log is sent."""
    end: dict[str, Any] = field(default_factory=lambda: {"status": "SUCCEEDED", "driver_exit_code": 0})
    """What the server says of the job in the end."""
    cuts: list[int] = field(default_factory=list)
    """Numbers of pieces after which a connection breaks, one for each."""
    cut_after: float = 0.0
    """Seconds for which such a connection stays silent first."""
    stays: bool = False
    """Whether the job goes on for ever."""
    hangs: bool = False
    """Whether the connection of a job that ends is never closed."""
    knows_no_job: bool = False
    """Whether the server has lost what it knew, as a head node that was started anew."""
    refusal: str = ""
    """What a submission is answered; empty: it is taken."""
    token: str = ""
    """What is asked for; empty: nothing."""
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    address: str = ""

    async def version(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

    async def package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
            return web.Response()
        return web.Response(status=200 if name in self.packages else 404)

    async def submit(self, request: web.Request) -> web.Response:
        job = await request.json()
        if self.refusal:
            return web.Response(status=500, text=self.refusal)
        self.submitted.append(job)
        return web.json_response({"job_id": "j", "submission_id": job.get("submission_id", "raysubmit_1")})

    async def details(self, request: web.Request) -> web.Response:
        if self.knows_no_job:
            return web.Response(status=404, text="Job raysubmit_1 does not exist")
        now = {"status": "RUNNING"} if self.stays or self.cuts else self.end
        return web.json_response({"type": "SUBMISSION", "submission_id": "raysubmit_1", "entrypoint": "x", **now})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cut = self.cuts[0] if self.cuts else None
        for piece in self.log[:cut]:
            await socket.send_str(piece)
        if cut is not None:
            await asyncio.sleep(self.cut_after)
            self.cuts.pop(0)
            assert request.transport is not None
            request.transport.abort()
        elif self.stays or self.hangs:
            await asyncio.sleep(_SECONDS)
        return socket

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**28)
        application.add_routes(
            [
                web.get("/api/version", self.version),
                web.route("*", "/api/packages/gcs/{name}", self.package),
                web.post("/api/jobs/", self.submit),
                web.get("/api/jobs/{id}", self.details),
                web.get("/api/jobs/{id}/logs/tail", self.tail),
            ]
        )
        return application


@contextmanager
def serving(server: FakeJobServer) -> Iterator[FakeJobServer]:
    """Let it answer, in a thread of its own."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.application(), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(_SECONDS)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_SECONDS)
