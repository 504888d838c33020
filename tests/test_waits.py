"""No wait bypasses ray_rl/deadlines.py. What counts as a wait, and which are found: tests/bare_waits.py."""

import re
from pathlib import Path

import pytest

from tests.bare_waits import Finder, Wait

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ray_rl", "actors", "learner")
ALLOWED = {
    "ray_rl.buffer:StalenessBuffer": (
        "nobody waits while holding its lock; the train loop looks at `take` every second, and the collect loop waits in `admit` "
        "for the train loop, whose every wait has a deadline"
    ),
    "ray_rl.cli:_run_program": "the user's own program in the foreground, for as long as the benchmarks take",
    "ray_rl.inventory": "threads that only read files and take digests",
    "actors.grader_channel:Channel": "the socket's own timeout is what is left of the caller's; a grader waits for its next job",
    "actors.pool_queue:WorkQueue.take": (
        "while actors serve, each of their groups has a deadline; while none does, `refuse` ends it after rollout.outage_timeout"
    ),
    "actors.rollout_client": "the pool asks through `Member.call` and `wait`: each verb has a deadline there",
    "actors.scoring:ProcessPoolScorer._serve": "a thread that waits for work; closing the scorer wakes it",
    "actors.weight_receiver:_watch": "a thread that waits for the end of the process that owns this one",
    "actors.weight_receiver:prove_digests": "threads that only take digests of mapped memory",
}
"""module:function -> why its waits need no deadline of their own."""


def sources() -> dict[str, str]:
    found = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


@pytest.fixture(scope="module")
def found() -> list[Wait]:
    return Finder(sources()).waits()


def test_no_wait_bypasses_the_deadlines(found):
    bare = [f"{wait.where}, line {wait.line}: {wait.code}" for wait in found if reason_for(wait) is None]
    assert not bare, "use ray_rl.deadlines, or say in ALLOWED why not:\n" + "\n".join(bare)


def test_no_exception_outlives_its_waits(found):
    assert not set(ALLOWED) - {reason_for(wait) for wait in found}


def reason_for(wait: Wait) -> str | None:
    """The entry of ALLOWED that covers a wait: its function, or the class or module that this lies in."""
    return next((place for place in ALLOWED if re.match(rf"{re.escape(place)}($|[:.])", wait.where)), None)


def waits_in(code: str) -> list[str]:
    head = "import asyncio, fcntl, ray, subprocess\nfrom ray_rl import deadlines\nfrom ray_rl.deadlines import wait\n"
    return [found.code for found in Finder({"ray_rl.snippet": head + code}).waits()]


BAD = {
    "a Ray reference": "async def f(actor):\n    return await actor.work.remote()",
    "a Ray reference with a name": "async def f(actor):\n    ref = actor.work.remote()\n    return await ref",
    "Ray references": "async def f(actors):\n    await asyncio.gather(*(actor.work.remote() for actor in actors))",
    "a Ray reference before a deadline": "async def g(x): ...\nasync def f(a):\n    await wait(g(await a.b.remote()), 1)",
    "a Ray reference handed to who awaits it": (
        "async def timed(work: Awaitable[T]):\n    return await work\n"
        "async def f(actor):\n    return await timed(actor.work.remote())"
    ),
    "a Ray reference made by a callback": (
        "async def call(make: Callable[[], Awaitable[T]]):\n    return await make()\n"
        "async def f(actor):\n    return await call(lambda: actor.work.remote())"
    ),
    "ray.get, its own timeout or not": "def f(ref):\n    return ray.get(ref, timeout=5)",
    "ray.get by another name": "from ray import get as fetch\ndef f(ref):\n    return fetch(ref)",
    "ray.wait": "def f(refs):\n    return ray.wait(refs, timeout=1)",
    "an event": "async def f(event):\n    await event.wait()",
    "asyncio.wait": "async def f(task):\n    await asyncio.wait({task})",
    "asyncio.wait_for": "async def g(): ...\nasync def f():\n    await asyncio.wait_for(g(), 5)",
    "a lock": "async def f(lock):\n    async with lock:\n        pass",
    "a semaphore of one's own": (
        "class A:\n    def __init__(self):\n        self._places = asyncio.Semaphore(2)\n"
        "    async def f(self):\n        await self._places.acquire()"
    ),
    "another library's coroutine that is called like one of ours": (
        "class A:\n    def __init__(self, llm: AsyncLLM):\n        self._llm = llm\n"
        "    async def pause(self):\n        await self._llm.pause()"
    ),
    "another library's stream": "async def f(llm):\n    async for output in llm.generate():\n        pass",
    "a group of tasks on a queue": (
        "async def f(queue):\n    async with asyncio.TaskGroup() as group:\n        group.create_task(queue.get())"
    ),
    "a thread through asyncio": "async def f(work):\n    await asyncio.to_thread(work)",
    "a coroutine that is under a deadline in one place only": (
        "async def f(actor):\n    await actor.work.remote()\n"
        "async def g(actor):\n    await wait(f(actor), 5, what='x')\nasync def h(actor):\n    await f(actor)"
    ),
    "a future": "def f(future):\n    return future.result()",
    "a queue": "def f(queue):\n    return queue.get()",
    "a queue in words": "def f(queue):\n    return queue.get(block=True)",
    "a thread": "def f(thread):\n    thread.join()",
    "a process": "def f(process):\n    return process.wait()",
    "a process's output": "def f(process):\n    return process.communicate(b'x')",
    "a command": "def f():\n    subprocess.run(['ls'], check=True)",
    "a pipe": "def f(connection):\n    return connection.recv()",
    "another process's lock": "def f(file):\n    fcntl.flock(file, fcntl.LOCK_EX)",
    "a pool of threads": "def f():\n    with ThreadPoolExecutor(2) as pool:\n        pool.submit(print)",
}

GOOD = {
    "under a deadline": "async def f(actor):\n    await wait(actor.work.remote(), 5, what='x')",
    "many under one": "async def f(actors):\n    await wait(asyncio.gather(*(a.b.remote() for a in actors)), 5, what='x')",
    "a coroutine of ours": "async def g(): ...\nasync def f():\n    await g()\n    await asyncio.gather(g(), g())",
    "a method of ours": (
        "class B:\n    async def go(self): ...\nclass A:\n    def __init__(self, b: B):\n        self._b = b\n"
        "    async def f(self):\n        await self._b.go()"
    ),
    "a coroutine of ours with a name": "async def g(): ...\nasync def f():\n    work = g()\n    await work",
    "a coroutine whose callers all have one": (
        "async def f(actor):\n    await actor.work.remote()\nasync def g(actor):\n    await deadlines.wait(f(actor), 5, what='x')"
    ),
    "a coroutine with a name that is awaited under one": (
        "async def f(actor):\n    await actor.work.remote()\n"
        "async def g(actor):\n    work = f(actor)\n    await wait(work, 5, what='x')"
    ),
    "one that hands on": (
        "async def bounded(work: Awaitable[T], what: str):\n    return await wait(work, 5, what=what)\n"
        "async def f(actor):\n    await bounded(actor.work.remote(), 'x')"
    ),
    "one that calls under a deadline": (
        "async def route(call: Callable[[A], Awaitable[T]]):\n    return await wait(call(1), 5, what='x')\n"
        "async def f(actor):\n    await route(lambda a: actor.work.remote(a))"
    ),
    "a callback of ours": (
        "async def g(): ...\nasync def call(make: Callable[[], Awaitable[T]]):\n    return await make()\n"
        "async def f():\n    await call(lambda: g())\n    await call(g)"
    ),
    "Ray's under a deadline": "def f(ref):\n    return deadlines.get(ref, 5, what='x')",
    "a sleep": "async def f():\n    await asyncio.sleep(1)",
    "tasks of ours": (
        "async def g(): ...\nasync def f():\n    async with asyncio.TaskGroup() as group:\n"
        "        tasks = [group.create_task(g()) for _ in range(3)]\n    return [task.result() for task in tasks]"
    ),
    "the first of some tasks": (
        "async def f(event):\n    task = asyncio.create_task(event.wait())\n"
        "    await deadlines.first_of([task], 5)\n    return task.result()"
    ),
    "words and mappings": "def f(words, mapping, key):\n    return ', '.join(words), mapping.get(key)",
    "timeouts": "def f(event, thread, program):\n    event.wait(5)\n    thread.join(timeout=1)\n    program.wait(timeout=1)",
    "a pipe that has something": "def f(pipe):\n    return pipe.recv() if pipe.poll(5) else None",
    "a lock that is there or not": "def f(file):\n    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
}


@pytest.mark.parametrize("code", BAD.values(), ids=BAD)
def test_a_bare_wait_is_found(code):
    assert len(waits_in(code)) == 1


@pytest.mark.parametrize("code", GOOD.values(), ids=GOOD)
def test_what_has_a_deadline_or_needs_none_is_not_found(code):
    assert waits_in(code) == []
