"""What the rollout actor costs: its tokens per second over those of a bare AsyncLLM on the same requests."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

from benchmarks.suite import Case, CaseResult, Options, median

_RECIPE = "laptop-grpo"


def run(options: Options) -> CaseResult:
    """Alternate between the actor and the bare engine in one process; the in-process LLM follows in its own."""
    measured = asyncio.run(_paired(options))
    gc.collect()  # an engine that is collected as late as the interpreter's end complains about it
    measured["LLM in-process"] = _in_process(options)
    rows = [
        {"path": path, "tokens/s (median)": median(rates), "min": min(rates), "max": max(rates)}
        for path, rates in measured.items()
    ]
    ratios = [a / b for a, b in zip(measured["rollout actor"], measured["AsyncLLM"], strict=True)]
    return CaseResult(headline={"actor_over_bare": median(ratios)}, rows=rows, details=measured)


async def _paired(options: Options) -> dict[str, list[float]]:
    import ray
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from actors.engine_args import engine_args, engine_environment
    from actors.rollout_actor import create_rollout_client
    from ray_rl.launch import model_source
    from ray_rl.tokenizer import load_tokenizer

    config, prompts = _requests(options.quick)
    model = model_source(config)
    os.environ.update(engine_environment(config))
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    client = create_rollout_client(config, model, f"bench-{os.getpid()}", 0, reward_actors=[])
    llm = None
    try:
        await client.start()
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(config, model, seed=1)))
        bare = partial(_bare, llm, config, load_tokenizer(model).eos_token_ids(), prompts)
        actor = partial(_through_actor, client, prompts)
        await bare()
        await actor()
        measured: dict[str, list[float]] = {"rollout actor": [], "AsyncLLM": []}
        for _ in range(options.repeats):
            measured["AsyncLLM"].append(await _rate(bare))
            measured["rollout actor"].append(await _rate(actor))
        return measured
    finally:
        if llm:
            llm.shutdown()
        await client.shutdown()
        ray.shutdown()


def _requests(quick: bool) -> tuple[Any, list[Any]]:
    """The recipe's configuration and the prompts of one of its steps."""
    from ray_rl.config import load_config
    from ray_rl.launch import Prepared

    config = load_config(_RECIPE, ["evaluation.problems=1"])
    stream = Prepared(config).stream
    return config, [stream.next() for _ in range(8 if quick else config.training.prompts_per_step)]


async def _rate(generate: Any) -> float:
    started = time.perf_counter()
    tokens = await generate()
    return tokens / (time.perf_counter() - started)


async def _through_actor(client: Any, prompts: list[Any]) -> int:
    groups = await asyncio.gather(*(client.collect(prompt) for prompt in prompts))
    return sum(group.summary.cost.primary_tokens for group in groups)


async def _bare(llm: Any, config: Any, eos: tuple[int, ...], prompts: list[Any]) -> int:
    """The same requests straight into AsyncLLM: no Ray, no scoring, no records of ours."""
    params = _params(config, eos)

    async def one(request_id: str, token_ids: tuple[int, ...]) -> int:
        async for output in llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id):
            tokens = len(output.outputs[0].token_ids)
        return tokens

    started = time.monotonic_ns()
    requests = [
        one(f"{started}-{index}-{sample}", prompt.token_ids)
        for index, prompt in enumerate(prompts)
        for sample in range(config.rollout.group_size)
    ]
    return sum(await asyncio.gather(*requests))


def _params(config: Any, eos: tuple[int, ...]) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        stop_token_ids=list(eos),
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

    config, prompts = _requests(quick)
    os.environ.update(engine_environment(config))
    model = model_source(config)
    llm = LLM(**engine_args(config, model, seed=1))
    params = _params(config, load_tokenizer(model).eos_token_ids())
    requests = [{"prompt_token_ids": list(p.token_ids)} for p in prompts for _ in range(config.rollout.group_size)]
    rates = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(tokens / (time.perf_counter() - started))
    print(json.dumps(rates[1:]))


ROLLOUT = Case(name="rollout", about="tokens/s of a rollout actor over a bare AsyncLLM, same requests", run=run)

if __name__ == "__main__":
    _measure_in_process(int(sys.argv[1]), bool(int(sys.argv[2])))
