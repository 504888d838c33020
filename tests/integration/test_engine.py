"""The engine against transformers, and what becomes of it when somebody dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.engine import EngineDied
from ray_rl.weight_file import shared_memory_folder
from tests.integration.tiny_engine import EOS, VOCABULARY, RunningEngine, hf_logprobs, running_engine, tiny_model

pytestmark = pytest.mark.integration

PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with running_engine(tmp_path_factory.mktemp("model"), seed=0, tied=True, block_size=32) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behavior_logprobs_are_those_of_transformers_at_the_sampling_temperature(
    tiny: RunningEngine, temperature: float
) -> None:
    completions = tiny.run(tiny.engine.generate(PROMPT, n=4, max_tokens=40, temperature=temperature))
    for completion in completions:
        expected = hf_logprobs(tiny.model, (*PROMPT, *completion.token_ids), temperature)[len(PROMPT) - 1 :]
        assert completion.behavior_logprobs == pytest.approx(expected, abs=1e-4)


def test_top_p_logprobs_are_renormalised_over_the_nucleus(tiny: RunningEngine) -> None:
    (completion,) = tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=1, top_p=0.3))
    with torch.no_grad():
        probabilities = tiny.model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).sort(descending=True).values
    nucleus = probabilities[: int((probabilities.cumsum(0) < 0.3).sum()) + 1]
    assert min(abs(p - completion.behavior_logprobs[0]) for p in (nucleus / nucleus.sum()).log().tolist()) < 1e-4


def test_temperature_zero_is_greedy(tiny: RunningEngine) -> None:
    (completion,) = tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=24, temperature=0))
    with torch.no_grad():
        expected = tiny.model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0, len(PROMPT) :]
    assert completion.token_ids == tuple(expected.tolist())


def test_prompt_logprobs_are_those_of_transformers(tiny: RunningEngine) -> None:
    assert tiny.run(tiny.engine.prompt_logprobs(PROMPT)) == pytest.approx(hf_logprobs(tiny.model, PROMPT), abs=1e-4)


def test_n_completions_differ_and_keep_the_token_limit(tiny: RunningEngine) -> None:
    completions = tiny.run(tiny.engine.generate(PROMPT, n=8, max_tokens=6))
    assert len(completions) == 8
    assert len({completion.token_ids for completion in completions}) > 1
    for completion in completions:
        assert len(completion.behavior_logprobs) == len(completion.token_ids) <= 6
        assert completion.finished or len(completion.token_ids) == 6


def test_the_same_seeds_give_the_same_tokens_whatever_else_runs(tiny: RunningEngine) -> None:
    def tokens(seeds: list[int]) -> list[tuple[int, ...]]:
        generated = tiny.run(tiny.engine.generate(PROMPT, n=len(seeds), max_tokens=20, seeds=seeds))
        return [completion.token_ids for completion in generated]

    async def beside_others() -> list[tuple[int, ...]]:
        asked = [
            tiny.engine.generate(PROMPT[:12], n=3, max_tokens=10),
            tiny.engine.generate(PROMPT, n=2, max_tokens=30),
        ]
        seeded = tiny.engine.generate(PROMPT, n=3, max_tokens=20, seeds=[2**62, 7, 8])
        *_, generated = await asyncio.gather(*asked, seeded)
        return [completion.token_ids for completion in generated]

    first = tokens([2**62, 7, 8])
    assert len(set(first)) == 3
    assert tokens([8, 2**62]) == [first[2], first[0]]
    assert tiny.run(beside_others()) == first
    with pytest.raises(ValueError, match="1 seeds for 2 completions"):
        tiny.run(tiny.engine.generate(PROMPT, n=2, max_tokens=2, seeds=[1]))


def test_every_token_carries_policy_version_zero_at_the_start(tiny: RunningEngine) -> None:
    (completion,) = tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=6))
    spans = [(span.version, span.start, span.end) for span in completion.versions]
    assert spans == [(0, 0, len(completion.token_ids))]


def test_the_end_of_sequence_token_is_the_last_one_and_is_included(tiny: RunningEngine) -> None:
    completions = tiny.run(tiny.engine.generate(PROMPT, n=32, max_tokens=400))
    finished = [completion for completion in completions if completion.finished]
    assert finished, "of 32 completions of up to 400 random tokens some should sample the end"
    for completion in finished:
        assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
    assert all(EOS not in completion.token_ids for completion in completions if not completion.finished)


def test_a_continuation_finds_the_whole_blocks_of_its_prefix_in_the_cache(tiny: RunningEngine) -> None:
    prefix = [2 + (7 * i) % (VOCABULARY - 2) for i in range(100)]
    (first,) = tiny.run(tiny.engine.generate(prefix, n=1, max_tokens=30, temperature=0))
    assert first.cached_tokens == 0
    second = tiny.run(tiny.engine.generate([*prefix, *first.token_ids[:4]], n=2, max_tokens=2))
    assert [completion.cached_tokens for completion in second] == [96, 96]


def test_a_prefix_that_leaves_no_room_is_an_error(tiny: RunningEngine) -> None:
    for prefix in ([], [5] * 512):
        with pytest.raises(ValueError, match="max_model_len"):
            tiny.run(tiny.engine.generate(prefix, n=1, max_tokens=4))


def test_a_healthy_engine_says_so(tiny: RunningEngine) -> None:
    tiny.run(tiny.engine.check_health())


def test_where_not_all_fit_the_smallest_priorities_go_first(tmp_path: Path) -> None:
    with running_engine(tmp_path, seed=0, tied=True, max_sequences=1) as tiny:
        ended: list[int] = []

        async def one(priority: int) -> None:
            await tiny.engine.generate(PROMPT, n=1, max_tokens=20, priority=priority)
            ended.append(priority)

        async def all_of() -> None:
            first = asyncio.ensure_future(one(5))
            await asyncio.sleep(0.05)
            await asyncio.gather(first, *(one(priority) for priority in (3, 4, 1, 2)))

        tiny.run(all_of())
        # The first one runs alone, unless the others came before it was taken up.
        assert ended in ([5, 1, 2, 3, 4], [1, 2, 3, 4, 5])


def test_a_killed_engine_process_fails_what_waits_for_it_by_name(tmp_path: Path) -> None:
    with running_engine(tmp_path, seed=0, tied=True) as doomed:

        async def kill_while_waiting() -> None:
            await doomed.engine.pause()  # so that the request certainly waits
            request = asyncio.ensure_future(doomed.engine.generate(PROMPT, n=2, max_tokens=400))
            await asyncio.sleep(0.2)
            for pid in _children(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await asyncio.wait_for(request, 30)
            for verb in (doomed.engine.check_health, doomed.engine.resume, doomed.engine.pause):
                with pytest.raises(EngineDied):
                    await asyncio.wait_for(verb(), 30)

        doomed.run(kill_while_waiting())


def test_the_engine_and_the_shared_memory_go_with_their_killed_owner(tmp_path: Path) -> None:
    tiny_model(0, tied=True).save_pretrained(tmp_path)
    run_id = f"test-{os.getpid()}"
    command = [sys.executable, "-m", "tests.integration.tiny_engine", str(tmp_path), run_id]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        engine_processes = _children(owner.pid)
        assert engine_processes
        assert list(shared_memory_folder().glob(f"ray-rl-{run_id}*.bin"))
    finally:
        owner.kill()
        owner.wait()
    deadline = time.monotonic() + 20
    while any(map(_lives, engine_processes)):
        assert time.monotonic() < deadline, "the engine outlives its owner"
        time.sleep(0.1)
    assert not list(shared_memory_folder().glob(f"ray-rl-{run_id}*"))


def _children(pid: int) -> list[int]:
    """Descendants of a process that run vLLM."""
    direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        direct += [int(child) for child in (thread / "children").read_text().split()]
    everyone = {*direct, *(grandchild for child in direct for grandchild in _children(child))}
    return [child for child in everyone if b"VLLM" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
