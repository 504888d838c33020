"""Weights on their way into a running engine: what arrives, what it computes with, and what breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import engine_args
from actors.engine import Engine
from ray_rl.types import Completion
from ray_rl.weight_file import NodeWeightFile
from ray_rl.weight_manifest import WeightManifest, WeightTransferError
from tests.integration.breaking_worker import BreakingExtension
from tests.integration.tiny_engine import (
    RunningEngine,
    hf_logprobs,
    probe_of,
    running_engine,
    tiny_model,
    write_weights,
)

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
PROMPT = [2 + (5 * i) % 90 for i in range(100)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with pytest.MonkeyPatch.context() as patch:
        extension = f"{BreakingExtension.__module__}.{BreakingExtension.__name__}"
        patch.setattr(engine_args, "WORKER_EXTENSION", extension)
        with running_engine(tmp_path_factory.mktemp("model"), seed=0, tied=request.param, block_size=32) as engine:
            yield engine


async def push(engine: Engine, manifest: WeightManifest, path: Path) -> None:
    await engine.pause()
    try:
        await engine.receive_weights(manifest, path)
    finally:
        await engine.resume()


def is_tied(tiny: RunningEngine) -> bool:
    return bool(tiny.model.config.tie_word_embeddings)


def test_after_a_push_the_engine_computes_with_the_new_weights(tiny: RunningEngine, tmp_path: Path) -> None:
    new = tiny_model(1, tied=is_tied(tiny))
    manifest = write_weights(new, 1, tmp_path / "weights")

    async def check() -> Completion:
        await push(tiny.engine, manifest, tmp_path / "weights")
        assert await tiny.engine.prove(probe_of(new), TOLERANCE) < TOLERANCE
        return (await tiny.engine.generate(PROMPT, n=1, max_tokens=20))[0]

    completion = tiny.run(check())
    assert tiny.engine.policy_version == 1
    assert [span.version for span in completion.versions] == [1]
    expected = hf_logprobs(new, (*PROMPT, *completion.token_ids))[len(PROMPT) - 1 :]
    assert completion.behavior_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_push_forgets_the_prefix_cache(tiny: RunningEngine, tmp_path: Path) -> None:
    manifest = write_weights(tiny_model(2, tied=is_tied(tiny)), 2, tmp_path / "weights")

    async def cached_tokens() -> list[int]:
        return [(await tiny.engine.generate(PROMPT, n=1, max_tokens=1))[0].cached_tokens for _ in range(2)]

    tiny.run(push(tiny.engine, manifest, tmp_path / "weights"))
    assert tiny.run(cached_tokens())[1] == 96
    tiny.run(push(tiny.engine, manifest, tmp_path / "weights"))
    assert tiny.run(cached_tokens()) == [0, 96]


def test_a_completion_in_flight_says_which_version_sampled_which_tokens(tiny: RunningEngine, tmp_path: Path) -> None:
    models = {version: tiny_model(version, tied=is_tied(tiny)) for version in (3, 4)}
    manifests = {v: write_weights(model, v, tmp_path / f"{v}") for v, model in models.items()}

    async def push_in_flight(seconds: float) -> list[Completion]:
        await push(tiny.engine, manifests[3], tmp_path / "3")
        running = asyncio.ensure_future(tiny.engine.generate(PROMPT[:40], n=16, max_tokens=400))
        await asyncio.sleep(seconds)
        await push(tiny.engine, manifests[4], tmp_path / "4")
        return [completion for completion in await running if len(completion.versions) > 1]

    # When the engine has begun and is not done yet depends on the machine.
    crossing = next(
        (found for seconds in (0.4, 0.2, 0.1, 0.8, 1.6, 3.2) if (found := tiny.run(push_in_flight(seconds)))), []
    )
    assert crossing, "no completion was in flight during the push"
    for completion in crossing:
        assert [span.version for span in completion.versions] == [3, 4]
        before, after = completion.versions
        assert (before.start, before.end, after.end) == (0, after.start, len(completion.token_ids))
        for span in completion.versions:
            of_version = hf_logprobs(models[span.version], (*PROMPT[:40], *completion.token_ids))[39:]
            sampled = completion.behavior_logprobs[span.start : span.end]
            assert sampled == pytest.approx(of_version[span.start : span.end], abs=1e-4)


def test_an_engine_that_waits_completes_what_runs_under_the_old_weights(tmp_path: Path) -> None:
    new = tiny_model(1, tied=True)
    manifest = write_weights(new, 1, tmp_path / "weights")
    with running_engine(tmp_path / "model", seed=0, tied=True, running="wait") as tiny:

        async def push_in_flight() -> tuple[tuple[Completion, ...], tuple[Completion, ...]]:
            running = asyncio.ensure_future(tiny.engine.generate(PROMPT[:40], n=16, max_tokens=400))
            await asyncio.sleep(0.4)
            pushing = asyncio.ensure_future(push(tiny.engine, manifest, tmp_path / "weights"))
            await asyncio.sleep(0.1)
            assert not pushing.done()
            assert not running.done()
            later = await tiny.engine.generate(PROMPT[:40], n=2, max_tokens=20)
            await pushing
            return await running, later

        before, after = tiny.run(push_in_flight())
        versions = [[span.version for span in completion.versions] for completion in before]
        assert [0] in versions
        assert all(of_completion in ([0], [1]) for of_completion in versions)  # [1]: not taken up before the push
        assert [[span.version for span in completion.versions] for completion in after] == [[1]] * 2
        assert tiny.run(tiny.engine.prove(probe_of(new), TOLERANCE)) < TOLERANCE


def test_one_wrong_byte_fails_the_digest_of_its_tensor_and_leaves_the_old_weights(
    tiny: RunningEngine, tmp_path: Path
) -> None:
    path, old_version = tmp_path / "weights", tiny.engine.policy_version
    manifest = write_weights(tiny_model(5, tied=is_tied(tiny)), 5, path)
    broken = manifest.tensors[3]
    content = bytearray(path.read_bytes())
    content[broken.offset + broken.nbytes // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(WeightTransferError, match=f"1 of {len(manifest.tensors)} tensors: {broken.name}"):
        tiny.run(push(tiny.engine, manifest, path))
    with pytest.raises(WeightTransferError, match="does not serve"):
        tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=1))
    assert tiny.engine.policy_version == old_version

    content[broken.offset + broken.nbytes // 2] ^= 1
    path.write_bytes(content)
    tiny.run(push(tiny.engine, manifest, path))
    assert tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=1))


def test_what_is_written_over_the_file_afterwards_does_not_reach_the_engine(
    tiny: RunningEngine, tmp_path: Path
) -> None:
    """The next version is written into the same memory while the engine goes on with this one."""
    path = tmp_path / "weights"
    manifest = write_weights(tiny_model(6, tied=is_tied(tiny)), 6, path)
    tiny.run(push(tiny.engine, manifest, path))
    before = tiny.run(tiny.engine.prompt_logprobs(PROMPT))
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert tiny.run(tiny.engine.prompt_logprobs(PROMPT)) == pytest.approx(before, abs=1e-6)


def test_versions_that_are_written_into_the_same_memory_reach_the_engine_one_by_one(
    tiny: RunningEngine, tmp_path: Path
) -> None:
    files, places = NodeWeightFile("transfer", tmp_path), set()
    for version in (11, 12, 13):
        new = tiny_model(version, tied=is_tied(tiny))
        manifest = write_weights(new, version, tmp_path / "content")
        content = memoryview((tmp_path / "content").read_bytes())
        path = files.ensure(version, lambda content=content: [content], timeout=5)
        tiny.run(push(tiny.engine, manifest, path))
        assert tiny.run(tiny.engine.prove(probe_of(new), TOLERANCE)) < TOLERANCE
        places.add(path.stat().st_ino)
    assert len(places) == 1
    files.close()


def test_a_file_that_is_too_short_fails_the_digest(tiny: RunningEngine, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    manifest = write_weights(tiny_model(6, tied=is_tied(tiny)), 6, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightTransferError, match=manifest.tensors[-1].name):
        tiny.run(push(tiny.engine, manifest, path))


def test_a_head_that_multiplies_with_old_weights_passes_the_digests_and_fails_the_probe(
    tiny: RunningEngine, tmp_path: Path
) -> None:
    if not is_tied(tiny):
        pytest.skip("an untied head receives weights of its own, with which vLLM repacks it")
    new = tiny_model(7, tied=True)
    manifest = write_weights(new, 7, tmp_path / "weights")

    async def break_and_push() -> None:
        await tiny.engine._llm.collective_rpc("skip_repacking_heads", args=(True,))
        try:
            await push(tiny.engine, manifest, tmp_path / "weights")
        finally:
            await tiny.engine._llm.collective_rpc("skip_repacking_heads", args=(False,))

    tiny.run(break_and_push())
    with pytest.raises(WeightTransferError, match="computes with something else"):
        tiny.run(tiny.engine.prove(probe_of(new), TOLERANCE))
    with pytest.raises(WeightTransferError, match="does not serve"):
        tiny.run(tiny.engine.generate(PROMPT, n=1, max_tokens=1))


def test_weights_of_another_policy_under_a_matching_manifest_fail_the_probe(
    tiny: RunningEngine, tmp_path: Path
) -> None:
    manifest = write_weights(tiny_model(8, tied=is_tied(tiny)), 8, tmp_path / "weights")
    tiny.run(push(tiny.engine, manifest, tmp_path / "weights"))
    with pytest.raises(WeightTransferError, match="computes with something else"):
        tiny.run(tiny.engine.prove(probe_of(tiny_model(9, tied=is_tied(tiny))), TOLERANCE))


def test_an_engine_that_is_not_paused_receives_nothing(tiny: RunningEngine, tmp_path: Path) -> None:
    manifest = write_weights(tiny_model(1, tied=is_tied(tiny)), 10, tmp_path / "weights")
    with pytest.raises(RuntimeError, match="pause"):
        tiny.run(tiny.engine.receive_weights(manifest, tmp_path / "weights"))
