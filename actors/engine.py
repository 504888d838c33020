"""vLLM's AsyncLLM behind few verbs: generate, prompt_logprobs, pause, receive_weights, resume."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from actors.engine_args import engine_args, prepare_environment, shutdown_seconds
from actors.engine_requests import completion, logprobs_of_prompt, sampling_params, scoring_params
from actors.occupancy import Occupancy
from ray_rl.config import RunConfig
from ray_rl.deadlines import wait
from ray_rl.errors import RunError
from ray_rl.garbage import uncollected
from ray_rl.types import Completion
from ray_rl.weight_manifest import Probe, WeightManifest, WeightTransferError

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
NcclVerb = Literal["init", "start", "update", "finish"]

_FIRST = -2
"""Priority before all prompts' positions, evaluation's -1 included."""
_HEALTH_SECONDS = 1.0
_START_GRACE_SECONDS = 30.0


class EngineDied(RunError):
    """The engine's process is gone; the engine can't be used any more."""


class Engine:
    """One vLLM engine: a process beside this one, spoken to through coroutines of one event loop."""

    def __init__(self, llm: AsyncLLM, config: RunConfig, stop_token_ids: Sequence[int]) -> None:
        """Use `start`; this only keeps the parts."""
        self._engine: AsyncLLM | None = llm
        self._config = config
        self._stop_token_ids = sorted({*stop_token_ids, *config.rollout.stop_token_ids})
        self._requests = itertools.count()
        self.occupancy = Occupancy(config.rollout.most_groups, config.rollout.max_sequences)
        """Of this engine; who makes groups on it says so there."""
        self._version = 0
        self._paused_at: float | None = None
        self._pause_seconds = 0.0
        self._distrusted: str | None = None

    @classmethod
    async def start(cls, config: RunConfig, model_path: str, *, eos_token_ids: Sequence[int], seed: int) -> Engine:
        """Load a model and label its weights as policy version 0.

        Args:
            config: the sections model, rollout and weights matter.
            model_path: folder in Hugging Face format, or a name.
            eos_token_ids: end a completion, besides rollout.stop_token_ids.
            seed: of the engine's sampling.

        Raises:
            EngineDied: the engine's process ended while it loaded; its own output says why.
            DeadlineExceeded: rollout.start_timeout passed.
        """
        prepare_environment(config)
        # Blocks for as long as the model loads; in a thread the event loop stays alive.
        # vLLM has the same deadline in its environment and cleans up after itself; ours is the second line.
        llm = await wait(
            asyncio.to_thread(_load, engine_args(config, model_path, seed)),
            config.rollout.start_timeout + _START_GRACE_SECONDS,
            what=f"the engine to load {model_path}",
        )
        engine = cls(llm, config, eos_token_ids)
        await engine._label(0)
        # What was loaded by now stays: walking through it would cost the collector half a second every few thousand
        # tokens, in which nothing is sent to the engine.
        gc.freeze()
        return engine

    @property
    def policy_version(self) -> int:
        """The version of the weights that sample now."""
        return self._version

    @property
    def pause_seconds(self) -> float:
        """How long the last pause was."""
        return self._pause_seconds

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        priority: int = 0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Completion, ...]:
        """Sample n completions of a prefix.

        Args:
            token_ids: [P], the prefix; P < model.max_model_len.
            n: completions.
            max_tokens: longest completion; it also ends where prefix and completion reach model.max_model_len.
            temperature: None is rollout.temperature; 0 is greedy, with log-probabilities at temperature 1.
            top_p: None is rollout.top_p.
            priority: the smallest go first where not all fit in the engine's batch.
            seeds: [n] of the completions' random numbers; None: the engine's own, which cost less.

        Raises:
            ValueError: the prefix is empty or leaves no room for a token, or there are not n seeds.
            EngineDied: the engine's process is gone.
            WeightTransferError: a transfer into this engine failed, so that nobody knows what it would sample from.
            DeadlineExceeded: rollout.group_timeout passed.
        """
        limit = self._config.model.max_model_len
        if not 0 < len(token_ids) < limit:
            raise ValueError(
                f"a prefix of {len(token_ids)} tokens; model.max_model_len = {limit} allows 1 to {limit - 1}"
            )
        self._check_trust()
        rollout = self._config.rollout
        params = partial(
            sampling_params,
            max_tokens=max_tokens,
            temperature=rollout.temperature if temperature is None else temperature,
            top_p=rollout.top_p if top_p is None else top_p,
            stop_token_ids=self._stop_token_ids,
        )
        # n requests and not one with n children, whose answer tells the cache hits of whichever child ended last.
        of_each = [params()] * n if seeds is None else [params(seed=seed) for seed in seeds]
        if len(of_each) != n:
            raise ValueError(f"{len(of_each)} seeds for {n} completions")
        outputs = await self._guarded(
            asyncio.gather(*(self._request(token_ids, of_one, priority) for of_one in of_each)),
            rollout.group_timeout,
            what=f"{n} completions of up to {max_tokens} tokens",
            sampling=True,
        )
        self._check_trust()
        return tuple(completion(output) for output in outputs)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """[P - 1] natural-log probabilities, at temperature 1, of token_ids[1:] ([P] given) under the present weights.

        Raises:
            EngineDied: the engine's process is gone.
            DeadlineExceeded: weights.timeout passed; also when the engine is paused, for it then answers nobody.
        """
        scored = self._request(token_ids, scoring_params(), _FIRST)
        output = await self._control(scored, what="log-probabilities of a prompt")
        return logprobs_of_prompt(output, token_ids)

    async def pause(self) -> None:
        """Freeze what runs, or complete it (weights.running), and queue what comes; forget all cached keys and values.

        A frozen completion goes on after `resume`, under the weights that the engine then has.
        """
        mode, started = self._config.weights.running, time.monotonic()
        await self._control(self._llm.pause_generation(mode=mode, clear_cache=True), what="the engine to pause")
        self._paused_at = started if mode == "keep" else time.monotonic()

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._control(self._llm.resume_generation(), what="the engine to resume")
        if self._paused_at is not None:
            self._pause_seconds = time.monotonic() - self._paused_at
            self._paused_at = None

    async def receive_weights(self, manifest: WeightManifest, path: Path) -> None:
        """Load a version from a flat file on this machine, and label what is sampled from now on with it.

        After a transfer that failed `generate` refuses, also what runs already, until another one succeeds.

        Args:
            manifest: what the file must hold.
            path: all chunks of the version, end to end.

        Raises:
            WeightTransferError: a tensor's bytes differ from the manifest (the engine still has its old weights), or
                loading failed (it then has neither, and must be replaced).
            RuntimeError: the engine is not paused.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._paused_at is None:
            raise RuntimeError("pause the engine before it receives weights")
        request = WeightTransferUpdateRequest(update_info={"path": str(path), "manifest": manifest.to_dict()})
        with self._transfer(manifest.version):
            await self._control(self._update_weights(request), what=f"the engine to load version {manifest.version}")
            await self._label(manifest.version)
        self._distrusted = None

    async def nccl(self, verb: NcclVerb, info: dict[str, Any]) -> None:
        """One step of vLLM's own NCCL transfer, driven by learner.nccl_publisher.NcclPublisher.

        Args:
            verb: `init` leaves the group there was and joins another; `start` pauses the engine; `update` receives; `finish`
                labels and resumes.
            info: vLLM's own for `init` and `update`; `{"version": int}` for `start` and `finish`.

        Raises:
            WeightTransferError: vLLM refused the step.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        what = f"step {verb} of an NCCL transfer"
        with self._transfer(info.get("version", "next")):
            if verb == "init":
                # vLLM would keep the communicator of a group that is no more, and its buffers on the GPU.
                await self._control(self._llm.shutdown_weight_transfer_engine(), what=what)
                await self._control(
                    self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)), what=what
                )
            elif verb == "start":
                await self.pause()
                await self._control(self._llm.start_weight_update(), what=what)
            elif verb == "update":
                await self._control(self._llm.update_weights(WeightTransferUpdateRequest(update_info=info)), what=what)
            else:
                await self._control(self._llm.finish_weight_update(), what=what)
                await self._label(info["version"])
                self._distrusted = None
                await self.resume()

    async def prove(self, probe: Probe, tolerance: float) -> float:
        """Compare what the engine multiplies with to the learner's weights. The engine must not be paused.

        Returns:
            The largest difference of a log-probability.

        Raises:
            WeightTransferError: it exceeds the tolerance; `generate` then refuses, also what runs already.
        """
        difference = probe.largest_difference(await self.prompt_logprobs(probe.token_ids))
        if not difference <= tolerance:
            self._distrusted = (
                f"version {self._version} arrived, but the engine computes with something else: log-probabilities of the "
                f"probe prompt differ from the learner's by {difference:.2g}, more than {tolerance:.2g}"
            )
            raise WeightTransferError(self._distrusted)
        return difference

    async def check_health(self) -> None:
        """Raise EngineDied when the engine's process is gone."""
        with _named_death():
            await wait(self._llm.check_health(), self._config.weights.timeout, what="the engine to say how it is")

    def shutdown(self) -> None:
        """End the engine's process; requests that wait raise EngineDied. Idempotent."""
        llm, self._engine = self._engine, None
        if llm is not None:
            llm.shutdown(timeout=shutdown_seconds(self._config))
            # Its __del__ would shut down once more, in the ruins of an interpreter that is ending.
            llm.shutdown = _nothing
            gc.unfreeze()

    async def _update_weights(self, request: WeightTransferUpdateRequest) -> None:
        await self._llm.start_weight_update()
        await self._llm.update_weights(request)
        await self._llm.finish_weight_update()

    @contextmanager
    def _transfer(self, version: int | str) -> Iterator[None]:
        """Part of a transfer; when it breaks off, nobody knows what the engine would sample from."""
        try:
            yield
        except BaseException as error:
            self._distrusted = f"version {version} was not received: {error}"
            # What a worker raises arrives as a bare Exception with its text; everything else has a type of its own.
            if type(error) is Exception:
                raise WeightTransferError(self._distrusted) from error
            raise

    @property
    def _llm(self) -> AsyncLLM:
        if self._engine is None:
            raise EngineDied("the engine was shut down")
        return self._engine

    async def _request(self, token_ids: Sequence[int], params: SamplingParams, priority: int) -> RequestOutput:
        from vllm.inputs.engine import tokens_input

        last: RequestOutput | None = None
        prompt = tokens_input(list(token_ids))
        request = str(next(self._requests))
        with self.occupancy.request():
            async for output in self._llm.generate(prompt, params, request_id=request, priority=priority):
                last = output
        if last is None:
            raise EngineDied("the engine ended a request without an answer")
        return last

    async def _label(self, version: int) -> None:
        await self._control(self._llm.update_weight_version(str(version)), what="the engine to take a version label")
        self._version = version

    async def _control(self, awaitable: Awaitable[T], *, what: str) -> T:
        return await self._guarded(awaitable, self._config.weights.timeout, what=what)

    async def _guarded(self, awaitable: Awaitable[T], seconds: float, *, what: str, sampling: bool = False) -> T:
        with _named_death():
            return await wait(self._watched(awaitable, sampling), seconds, what=what)

    async def _watched(self, awaitable: Awaitable[T], sampling: bool) -> T:
        # vLLM fails the requests of an engine that dies, but answers to control calls would be awaited for ever.
        task = asyncio.ensure_future(awaitable)
        try:
            while not (await asyncio.wait({task}, timeout=_HEALTH_SECONDS))[0]:
                await self._llm.check_health()
                if sampling:
                    self._check_trust()
            return task.result()
        finally:
            task.cancel()
            task.add_done_callback(_forget)

    def _check_trust(self) -> None:
        if self._distrusted is not None:
            raise WeightTransferError(f"this engine does not serve: {self._distrusted}")


def _load(args: dict[str, Any]) -> AsyncLLM:
    with uncollected():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
    except RuntimeError as error:
        raise EngineDied(f"the engine did not start: {error}") from error


def _forget(task: asyncio.Future[Any]) -> None:
    """Of a request that was given up, asyncio would log at length that nobody looked at its end."""
    if not task.cancelled():
        task.exception()


def _nothing() -> None:
    pass


@contextmanager
def _named_death() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError:
        # vLLM raises one and the same error in every request, whose traceback so becomes that of all of them, and says nothing.
        raise EngineDied("the engine's process is gone") from None
