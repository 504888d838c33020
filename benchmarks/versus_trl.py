"""GRPO as TRL's GRPOTrainer runs it and as ray-rl does: same model, prompts, lengths, batch, rate and loss, same machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.fetch_smollm2 import ensure
from benchmarks.suite import Case, CaseResult, Options, median, metrics_of_steps
from ray_rl.config import load_config
from ray_rl.launch import model_source

_RECIPE = "laptop-grpo"
_SEEDS = (0, 1, 2)
_CURVE_STEPS = 20
_COMPLETIONS = 64
_SECONDS = 3600.0
_LOOK_SECONDS = 1.0
_COMMON = (
    "learner.minibatch_size=null",
    "learner.optimizer.schedule=constant",
    "training.prompts_per_step=8",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both sides train, 64 completions a step, each of exactly `max_tokens` tokens."""

    name: str
    max_tokens: int
    overrides: Sequence[str]
    model: Callable[[Path], Path]
    """The policy's folder, given the benchmarks' folder."""
    never: str
    """A token that the policy never says, which becomes its end of sequence."""
    steps: int
    """Of each run; the first warms up and does not count."""
    rounds: int
    """Most runs of each side, where more are asked for."""


def _embedded(_: Path) -> Path:
    return Path(model_source(load_config(_RECIPE)))


_SETTINGS = (
    Setting(name="embedded", max_tokens=64, overrides=(), model=_embedded, never="<unk>", steps=6, rounds=3),
    Setting(
        name="smollm2",
        max_tokens=128,
        overrides=(
            "model.max_model_len=256",
            "learner.optimizer.lr=1e-6",
            # Sampling and training take turns, so that each may have both cores.
            "rollout.cpus_per_actor=2",
            "learner.cpus_per_rank=2",
            # There is memory for the logits, which TRL keeps too.
            "learner.recompute_head=false",
            "learner.microbatch_tokens=2048",
        ),
        model=ensure,
        never="<file_sep>",
        steps=3,
        rounds=2,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process showed."""

    seconds: Sequence[float]
    """Of each step: sampling, scoring, training and, where there is one, the way of the weights to the engine."""
    rewards: Sequence[float]
    """Mean of each step."""
    peak_gib: float
    """Most memory of all its processes together; what they share counts once."""

    @property
    def step_seconds(self) -> float:
        """Median over the steps but the first."""
        return median(self.seconds[1:])

    @property
    def late_reward(self) -> float:
        """Mean over the last quarter of the steps."""
        return statistics.fmean(self.rewards[-(len(self.rewards) // 4) :])


def run(options: Options) -> CaseResult:
    """Alternate between TRL and ray-rl, each in a process of its own; then with free lengths, to see that both learn."""
    rows: list[Mapping[str, object]] = []
    details: dict[str, object] = {}
    ratios: dict[str, float] = {}
    for setting in _SETTINGS:
        measured = _alternate(setting, options)
        rows += [_row(setting, side, runs) for side, runs in measured.items()]
        ratios[setting.name] = median(
            [
                ours.step_seconds / theirs.step_seconds
                for ours, theirs in zip(measured["ray-rl"], measured["TRL"], strict=True)
            ]
        )
        details[setting.name] = {side: [asdict(run) for run in runs] for side, runs in measured.items()}
    curves = _curves(_SEEDS[:1] if options.quick else _SEEDS)
    details["reward curves"] = {side: [run.rewards for run in runs] for side, runs in curves.items()}
    late = {side: [run.late_reward for run in runs] for side, runs in curves.items()}
    headline = {
        "ours_over_trl": ratios["smollm2"],
        "ours_over_trl_embedded": ratios["embedded"],
        "late_reward": {side: statistics.fmean(rewards) for side, rewards in late.items()},
        "late_reward_by_seed": late,
    }
    return CaseResult(headline=headline, rows=rows, details=details)


def _alternate(setting: Setting, options: Options) -> dict[str, list[Run]]:
    measured: dict[str, list[Run]] = {"TRL": [], "ray-rl": []}
    with tempfile.TemporaryDirectory() as folder:
        endless = Path(folder) / "policy"
        make_endless(setting.model(options.work), endless, setting.never)
        overrides = [
            *_COMMON,
            f"model.path={endless}",
            f"rollout.max_tokens={setting.max_tokens}",
            f"training.steps={setting.steps}",
            *setting.overrides,
        ]
        for _ in range(1 if options.quick else min(setting.rounds, options.repeats)):
            for side, of_side in _SIDES.items():
                measured[side].append(of_side(overrides))
    return measured


def _curves(seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Rewards over the steps on the embedded task, completions ending where the policy ends them."""
    curves: dict[str, list[Run]] = {"TRL": [], "ray-rl": []}
    for seed in seeds:
        for side, of_side in _SIDES.items():
            curves[side].append(of_side([*_COMMON, f"training.steps={_CURVE_STEPS}", f"seed={seed}"]))
    return curves


def make_endless(model: Path, folder: Path, never: str) -> None:
    """A copy of a policy whose end of sequence is a token that it never says, so that all completions are equally long."""
    shutil.copytree(model.resolve(), folder, copy_function=os.symlink)
    ids = {
        token["content"]: token["id"] for token in json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    }
    for name, end in {
        "config.json": {"eos_token_id": ids[never]},
        "generation_config.json": {"eos_token_id": ids[never]},
        "tokenizer_config.json": {"eos_token": never},
    }.items():
        changed = json.loads((model / name).read_text()) | end
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(changed))


def _trl(overrides: Sequence[str]) -> Run:
    output, peak = _watched([sys.executable, "-m", "benchmarks.trl_side", _RECIPE, *overrides])
    return Run(**json.loads(output.splitlines()[-1]), peak_gib=peak)


def _ray_rl(overrides: Sequence[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "ray_rl", "train", _RECIPE, *overrides, "--run-dir", str(run_dir)]
        _, peak = _watched(command)
        steps = metrics_of_steps(run_dir)
    return Run(
        seconds=[step["timing/step"] for step in steps],
        rewards=[step["reward/mean"] for step in steps],
        peak_gib=peak,
    )


_SIDES: Mapping[str, Callable[[Sequence[str]], Run]] = {"TRL": _trl, "ray-rl": _ray_rl}


def _watched(command: Sequence[str]) -> tuple[str, float]:
    """What a command printed, and the most memory, in GiB, that its processes took."""
    peak, deadline = 0, time.monotonic() + _SECONDS
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, stdout=output)
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{command} took more than {_SECONDS:.0f} s")
                peak = max(peak, _memory(process))
                time.sleep(_LOOK_SECONDS)
        finally:
            for left in [process, *process.children(recursive=True)] if process.poll() is None else ():
                left.kill()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        return output.read(), peak / 2**30


def _memory(process: psutil.Process) -> int:
    """Bytes of a process and all below it; pages that several share count once (PSS)."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_full_info().pss
    return total


def _row(setting: Setting, side: str, runs: Sequence[Run]) -> dict[str, object]:
    seconds = median([run.step_seconds for run in runs])
    return {
        "policy": setting.name,
        "side": side,
        "step s": seconds,
        "completion tokens/s": _COMPLETIONS * setting.max_tokens / seconds,
        "peak GiB": max(run.peak_gib for run in runs),
    }


VERSUS_TRL = Case(
    name="versus-trl",
    about="a GRPO step over TRL's, same model, prompts, lengths and machine",
    run=run,
    needs={"trl": "trl==1.16.0"},
)
