"""What rollouts cost: tokens per second of rollout actors over those of a bare AsyncLLM on the same requests."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from actors.rollout_client import RayRolloutClient, create_rollout_client
from benchmarks.suite import Case, CaseResult, Options, median
from ray_rl.config import load_config
from ray_rl.protocols import CollectedGroup
from ray_rl.types import Prompt, TrajectoryGroup

_COMPLETIONS = load_config("laptop-grpo", ["evaluation.problems=1"])
_CONTINUED = load_config("laptop-vineppo", ["evaluation.problems=1"])
_TWO_THREADS = load_config("laptop-vineppo", ["evaluation.problems=1", "rollout.cpus_per_actor=2"])
_WAITING = 2
"""Groups handed out for each place, to see whether the batch stays full while groups wait."""

Request = tuple[tuple[int, ...], int]
"""Prefix, most tokens."""


def run(options: Options) -> CaseResult:
    """Take turns between actors and the bare engine; the in-process LLM follows in a process of its own."""
    measured, underfull = asyncio.run(_paired(options))
    gc.collect()  # an engine that is collected as late as the interpreter's end complains about it
    measured["LLM in-process, completions"] = _in_process(options)
    rows = [
        {"path": path, "tokens/s (median)": median(rates), "min": min(rates), "max": max(rates)}
        for path, rates in measured.items()
    ]

    def ratio(one: str, other: str) -> float:
        return median([a / b for a, b in zip(measured[one], measured[other], strict=True)])

    headline = {
        "actor_over_bare": ratio("actor, continuations", "AsyncLLM, the same requests"),
        "actor_over_bare_completions": ratio("actor, completions", "AsyncLLM, completions"),
        "two_actors_over_two_threads": ratio("2 actors, 1 thread each", "1 actor, 2 threads"),
        "underfull_share": median(underfull),
    }
    return CaseResult(headline=headline, rows=rows, details={**measured, "underfull_share": underfull})


class _Rollouts:
    """The prompts of a step through each path; every method returns the tokens that were sampled."""

    def __init__(self, prompts: Sequence[Prompt], clients: Sequence[RayRolloutClient], bare: _Bare) -> None:
        self._prompts = prompts
        self._completing, self._first, self._second, self._threaded = clients
        self._bare = bare
        self._recorded: list[TrajectoryGroup] = []

    async def bare_completions(self) -> int:
        return await self._bare.run([[_completions(prompt.token_ids)] for prompt in self._prompts])

    async def completions(self) -> int:
        return _tokens(await self._collect([self._completing]))

    async def continuations(self) -> int:
        import ray

        groups = await self._collect([self._first])
        self._recorded = ray.get([group.ref for group in groups])
        return _tokens(groups)

    async def bare_continuations(self) -> int:
        """What `continuations` asked for last: of each group first its completions, then all that continued them."""
        return await self._bare.run([_requests_of(group) for group in self._recorded])

    async def two_actors(self) -> int:
        return _tokens(await self._collect([self._first, self._second]))

    async def two_threads(self) -> int:
        return _tokens(await self._collect([self._threaded]))

    async def underfull_share(self) -> float:
        """Of the time in which groups waited for a place, that in which the batch was less than half full."""
        places = asyncio.Semaphore(_CONTINUED.rollout.most_groups)
        await self._first.take_underfull()
        started = waited = time.perf_counter()

        async def collect(prompt: Prompt) -> None:
            nonlocal waited
            async with places:
                waited = time.perf_counter()
                await self._first.collect(prompt)

        prompts = itertools.islice(itertools.cycle(self._prompts), _WAITING * _CONTINUED.rollout.most_groups)
        await asyncio.gather(*(collect(prompt) for prompt in prompts))
        return await self._first.take_underfull() / (waited - started)

    async def _collect(self, clients: Sequence[RayRolloutClient]) -> list[CollectedGroup]:
        """A group of every prompt; the prompts are dealt out."""
        turns = zip(itertools.cycle(clients), self._prompts, strict=False)
        return await asyncio.gather(*(client.collect(prompt) for client, prompt in turns))


async def _paired(options: Options) -> tuple[dict[str, list[float]], list[float]]:
    """Tokens/s of each path, and the share of time in which the batch was less than half full while groups waited."""
    async with _rollouts(_prompts(options.quick)) as rollouts:
        paths = {
            "AsyncLLM, completions": rollouts.bare_completions,
            "actor, completions": rollouts.completions,
            "actor, continuations": rollouts.continuations,
            "AsyncLLM, the same requests": rollouts.bare_continuations,
            "2 actors, 1 thread each": rollouts.two_actors,
            "1 actor, 2 threads": rollouts.two_threads,
        }
        for work in paths.values():  # warm up
            await work()
        measured: dict[str, list[float]] = {path: [] for path in paths}
        underfull = []
        for _ in range(options.repeats):
            for path, work in paths.items():
                started = time.perf_counter()
                tokens = await work()
                measured[path].append(tokens / (time.perf_counter() - started))
            underfull.append(await rollouts.underfull_share())
        return measured, underfull


@asynccontextmanager
async def _rollouts(prompts: Sequence[Prompt]) -> AsyncIterator[_Rollouts]:
    """Start all engines; they end with the context."""
    import ray

    from actors.engine_args import engine_environment
    from ray_rl.launch import model_source

    configs = (_COMPLETIONS, _CONTINUED, _CONTINUED, _TWO_THREADS)
    model, run_id = model_source(_COMPLETIONS), f"bench-{os.getpid()}"
    os.environ.update(engine_environment(_COMPLETIONS))
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20)
    clients = [
        create_rollout_client(config, model, run_id, index, reward_actors=[]) for index, config in enumerate(configs)
    ]
    bare = None
    try:
        for client in clients:
            await client.start()
        bare = _Bare(model)
        yield _Rollouts(prompts, clients, bare)
    finally:
        if bare:
            bare.shutdown()
        for client in clients:
            await client.shutdown()
        ray.shutdown()


class _Bare:
    """An AsyncLLM and nothing of ours: no Ray, no scoring, no records."""

    def __init__(self, model: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.engine_args import engine_args
        from ray_rl.tokenizer import load_tokenizer

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(_COMPLETIONS, model, seed=1)))
        self._stop = load_tokenizer(model).eos_token_ids()
        self._ids = itertools.count()

    async def run(self, groups: Sequence[Sequence[Sequence[Request]]]) -> int:
        """All groups at once; of a group, one batch of requests after the other. Returns the tokens sampled."""

        async def in_turn(batches: Sequence[Sequence[Request]]) -> int:
            return sum([sum(await asyncio.gather(*(self._one(request) for request in batch))) for batch in batches])

        return sum(await asyncio.gather(*(in_turn(batches) for batches in groups)))

    def shutdown(self) -> None:
        self._llm.shutdown()
        del self._llm  # collected as late as the interpreter's end it would complain

    async def _one(self, request: Request) -> int:
        token_ids, most = request
        prompt = {"prompt_token_ids": list(token_ids)}
        async for output in self._llm.generate(prompt, _params(self._stop, most), str(next(self._ids))):
            tokens = len(output.outputs[0].token_ids)
        return tokens


def _completions(prompt: tuple[int, ...]) -> list[Request]:
    return [(prompt, _COMPLETIONS.rollout.max_tokens)] * _COMPLETIONS.rollout.group_size


def _requests_of(group: TrajectoryGroup) -> list[list[Request]]:
    """The requests that made a group."""
    prompt, most = group.prompt.token_ids, _CONTINUED.rollout.max_tokens
    continued = [
        ((*prompt, *group.trajectories[c.trajectory].completion.token_ids[: c.boundary]), most - c.boundary)
        for c in group.continuations
    ]
    return [[(prompt, most)] * len(group.trajectories), continued]


def _tokens(groups: Sequence[CollectedGroup]) -> int:
    costs = [group.summary.cost for group in groups]
    return sum(cost.primary_tokens + cost.continuation_tokens for cost in costs)


def _prompts(quick: bool) -> list[Prompt]:
    """Of one step of the recipes."""
    from ray_rl.launch import Prepared

    stream = Prepared(_COMPLETIONS).stream
    return [stream.next() for _ in range(8 if quick else _COMPLETIONS.training.prompts_per_step)]


def _params(stop: Sequence[int], most: int) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=most,
        temperature=_COMPLETIONS.rollout.temperature,
        stop_token_ids=list(stop),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _in_process(options: Options) -> list[float]:
    """The synchronous LLM in a process of its own, whose environment turns off vLLM's engine process."""
    command = [sys.executable, "-m", "benchmarks.rollout", str(options.repeats), str(int(options.quick))]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=1800)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_in_process(repeats: int, quick: bool) -> None:
    from vllm import LLM

    from actors.engine_args import engine_args, engine_environment
    from ray_rl.launch import model_source
    from ray_rl.tokenizer import load_tokenizer

    os.environ.update(engine_environment(_COMPLETIONS))
    model = model_source(_COMPLETIONS)
    llm = LLM(**engine_args(_COMPLETIONS, model, seed=1))
    params = _params(load_tokenizer(model).eos_token_ids(), _COMPLETIONS.rollout.max_tokens)
    requests = [request for prompt in _prompts(quick) for request in _completions(prompt.token_ids)]
    rates = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids, _ in requests], params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(tokens / (time.perf_counter() - started))
    print(json.dumps(rates[1:]))


ROLLOUT = Case(name="rollout", about="tokens/s of rollout actors over a bare AsyncLLM, same requests", run=run)

if __name__ == "__main__":
    _measure_in_process(int(sys.argv[1]), bool(int(sys.argv[2])))
