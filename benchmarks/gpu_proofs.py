"""What `gpu-check` proves, each proof in a process of its own: `python -m benchmarks.gpu_proofs SETTING`.

A proof fills in figures as it goes and raises where something is not as it must be; both end up in a file of its folder.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import ray

from actors.engine_args import probe_tolerance
from actors.rollout_client import RayRolloutClient, create_rollout_client
from benchmarks.gpu_actor import CheckedActor, Sampled
from benchmarks.gpu_environment import machine_facts
from benchmarks.gpu_policies import two_policies
from benchmarks.suite import metrics_of_steps
from benchmarks.training_process import TrainingProcess
from learner.group import LearnerGroup
from ray_rl.config import RunConfig, load_config
from ray_rl.deadlines import get, wait
from ray_rl.launch import Prepared
from ray_rl.ray_session import ray_session, run_to_end
from ray_rl.weight_file import sweep

RECIPE = "laptop-grpo"
FOUND = "found.json"
"""File of a proof's folder: {"figures": ..., "error": what it failed with, or null}."""

_SECONDS = 120.0
"""That one verb of an actor may take."""
_LOAD_SECONDS = 400.0
_PUSHES = 3
_PROMPTS = 8
_COMPLETIONS = 4
_MAX_TOKENS = 48
_LEAST_RISE = 0.2

Figures = dict[str, Any]


class ProofFailed(AssertionError):
    """Something is not as it must be; the message is a line with the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of one proof, as it travels to its process."""

    kind: str
    """Key of PROOFS."""
    folder: str
    """Of its own."""
    work: str
    """Of all proofs: policies that several look at."""
    overrides: tuple[str, ...]
    """Of the recipe."""
    gpus: int
    """In this machine or cluster; 0: the proofs run on CPUs."""
    model: str | None
    """Folder of a policy; None: the built-in one."""
    seconds: float
    """After which the process is ended."""

    @property
    def config(self) -> RunConfig:
        """The recipe with the overrides."""
        return load_config(RECIPE, self.overrides)


def environment(setting: Setting, figures: Figures) -> None:
    """Versions, GPUs and how they are connected, as a task that holds a GPU sees them."""
    with ray_session(setting.config):
        look = ray.remote(num_gpus=min(1, setting.gpus), num_cpus=1)(machine_facts)
        figures.update(cast(Figures, get(look.remote(), _SECONDS, what="a task that looks at its machine")))
    if setting.gpus and not figures["CUDA"]:
        raise ProofFailed("torch was built without CUDA; use make setup ACCELERATOR=cuda")
    if setting.gpus and figures["GPUs of a task"] != 1:
        raise ProofFailed(f"a Ray task that asks for one GPU sees {figures['GPUs of a task']}")


def sync(setting: Setting, figures: Figures) -> None:
    """Engines begin with one policy, the learner brings another: pushed, proven, and computed with alike."""
    run_to_end(_sync(setting, figures, replaces=False))


def replacement(setting: Setting, figures: Figures) -> None:
    """As `sync`; then an engine is ended, and the one in its place gets the weights as well."""
    run_to_end(_sync(setting, figures, replaces=True))


def training(setting: Setting, figures: Figures) -> None:
    """`ray-rl train` with the built-in policy, whose reward must rise."""
    run = TrainingProcess(Path(setting.folder) / "run")
    try:
        run.start(RECIPE, *setting.overrides)
        code = run.wait_for_end(setting.seconds - 30)
    finally:
        run.end()
    if code:
        raise ProofFailed(f"ray-rl train ended with {code}: {run.printed.strip().splitlines()[-1]}")
    steps = metrics_of_steps(run.folder)
    rewards = [step["reward/mean"] for step in steps]
    last = rewards[-max(1, len(rewards) // 4) :]
    figures["steps"] = len(steps)
    figures["first reward"] = rewards[0]
    figures["last reward"] = statistics.fmean(last)
    figures["s a step"] = statistics.median(step["timing/step"] for step in steps)
    figures["probe"] = max(step["weights/probe_max_abs_diff"] for step in steps)
    figures["rewards"] = rewards
    if not figures["last reward"] - rewards[0] > _LEAST_RISE:
        raise ProofFailed(f"the reward went from {rewards[0]:.2f} to {figures['last reward']:.2f}; it must rise")


PROOFS: Mapping[str, Callable[[Setting, Figures], None]] = {
    "environment": environment,
    "sync": sync,
    "replacement": replacement,
    "training": training,
}


async def _sync(setting: Setting, figures: Figures, *, replaces: bool) -> None:
    config, run_id = setting.config, uuid.uuid4().hex[:12]
    base = Path(setting.model) if setting.model else None
    old, new = two_policies(Path(setting.work), base, shards=config.rollout.tensor_parallel)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(old)})})
    prompts = [prompt.token_ids for prompt in _first_prompts(config)]
    with ray_session(config):
        stage = _Stage(config, str(old), run_id)
        try:
            await stage.start(str(new))
            await stage.push(figures)
            await stage.compare(prompts, figures)
            if replaces:
                await stage.replace()
                await stage.push(figures)
        finally:
            await stage.end()
            sweep(run_id)


class _Stage:
    """An engine and a learner with different policies."""

    def __init__(self, config: RunConfig, policy: str, run_id: str) -> None:
        self._config = config
        self._policy = policy
        self._run_id = run_id
        self._made = 0
        self._version = 0
        self._client = self._new_client()
        self._learner: LearnerGroup | None = None

    async def start(self, new: str) -> None:
        """Both at once."""
        group = LearnerGroup.start(self._config, new, self._run_id, may_grow=False)
        self._learner, _ = await asyncio.gather(group, self._load())

    async def push(self, figures: Figures) -> None:
        """Several times, timed; the probe must tell the policies apart before, and find them equal after each."""
        assert self._learner is not None
        tolerance, probe = probe_tolerance(self._config), await self._learner.probe()
        before = probe.largest_difference(await self._ask("score", probe.token_ids))
        figures["probe before"] = before
        if before < 2 * tolerance:
            raise ProofFailed(f"the probe cannot tell the policies apart: {before:.2g} nats")
        pushes, differences = [], []
        for _ in range(_PUSHES):
            self._version += 1
            started = time.monotonic()
            weights = await self._learner.publish(self._version, [self._client.receiver])
            await wait(self._client.receive_weights(weights), _SECONDS, what="the engine to take the weights")
            pushes.append(time.monotonic() - started)
            proven = self._client.prove_weights(await weights.probe())
            differences.append(await wait(proven, _SECONDS, what="the engine to prove its weights"))
        figures["probe"], figures["tolerance"] = max(differences), tolerance
        figures["push s"], figures["pushes"] = statistics.median(pushes), pushes
        if weights.payload is not None:
            figures["tensors by digest"] = len(weights.payload.manifest.tensors)
        figures["checksum"] = await self._ask("checksum")

    async def compare(self, prompts: Sequence[Sequence[int]], figures: Figures) -> None:
        """The engine's log-probabilities of what it samples, with the learner's of the same tokens."""
        assert self._learner is not None
        samples: list[Sampled] = await self._ask("sample", prompts, _COMPLETIONS, _MAX_TOKENS)
        differences: list[float] = []
        for sampled in samples:
            ours = (await self._learner.logprobs(sampled.token_ids))[-len(sampled.logprobs) :]
            differences += [abs(one - other) for one, other in zip(ours, sampled.logprobs, strict=True)]
        mean, most, tolerance = statistics.fmean(differences), max(differences), probe_tolerance(self._config)
        figures |= {"tokens": len(differences), "parity mean": mean, "parity max": most}
        if not (mean <= tolerance / 20 and most <= tolerance):
            raise ProofFailed(
                f"engine and learner differ by {mean:.2g} nats a token on average, {most:.2g} at most; allowed are "
                f"{tolerance / 20:.2g} and {tolerance:.2g}"
            )

    async def replace(self) -> None:
        """End the engine; another takes its place, with the policy that engines begin with."""
        await self._client.shutdown()
        self._client = self._new_client()
        await self._load()

    async def end(self) -> None:
        """Leave nothing running."""
        if self._learner:
            self._learner.shutdown()
        await self._client.shutdown()

    def _new_client(self) -> RayRolloutClient:
        self._made += 1
        return create_rollout_client(
            self._config, self._policy, self._run_id, self._made, reward_actors=[], kind=CheckedActor
        )

    async def _load(self) -> None:
        await wait(self._client.start(), _LOAD_SECONDS, what="an engine to load")

    async def _ask(self, verb: str, *args: object) -> Any:
        return await wait(getattr(self._client.handle, verb).remote(*args), _SECONDS, what=f"the engine to {verb}")


def _first_prompts(config: RunConfig) -> list[Any]:
    stream = Prepared(config, evaluates=False).stream
    return [stream.next() for _ in range(_PROMPTS)]


def main(setting: Setting) -> None:
    """Run one proof and write what it found, also where it fails."""
    figures: Figures = {}
    try:
        PROOFS[setting.kind](setting, figures)
    finally:
        error = sys.exc_info()[1]
        found = {"figures": figures, "error": None if error is None else _line(error)}
        (Path(setting.folder) / FOUND).write_text(json.dumps(found, indent=2))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ProofFailed) else f"{type(error).__name__}: {text}"


def as_argument(setting: Setting) -> str:
    """What `python -m benchmarks.gpu_proofs` takes."""
    return json.dumps(asdict(setting))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Setting(**{**given, "overrides": tuple(given["overrides"])}))
