"""Which proofs a machine gets, that each is a configuration that holds, and that none hides what became of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import PROOFS, Outcome, lacks, overrides, report
from benchmarks.gpu_policies import two_policies
from benchmarks.gpu_proofs import FOUND, RECIPE, Setting
from benchmarks.gpu_proofs import PROOFS as KINDS
from benchmarks.suite import Options
from ray_rl.config import load_config


def options(**given: Any) -> Options:
    return Options(**{"repeats": 1, "quick": False, "minutes": 1, "work": Path("unused"), **given})


def proven(gpus: int, **given: Any) -> list[str]:
    return [proof.name for proof in PROOFS if not proof.skipped(options(**given), gpus)]


@pytest.mark.parametrize("gpus", [0, 1, 2, 3])
def test_each_proof_that_is_not_skipped_is_a_valid_recipe_that_fits(gpus: int) -> None:
    for proof in PROOFS:
        if not proof.skipped(options(on_cpu=gpus == 0), gpus):
            config = load_config(RECIPE, overrides(proof, gpus))
            wanted = config.rollout.gpus_per_actor + config.learner.ranks * config.learner.gpus_per_rank
            assert wanted <= gpus, proof.name
            assert proof.kind in KINDS


def test_proofs_have_names_of_their_own_and_equal_only_earlier_ones() -> None:
    names = [proof.name for proof in PROOFS]
    assert len({*names}) == len(names)
    for index, proof in enumerate(PROOFS):
        assert proof.equals in {"", *names[:index]}


def test_two_gpus_show_nearly_everything_and_three_all() -> None:
    assert [proof.name for proof in PROOFS if proof.name not in proven(2)] == [
        "ZeRO-3 over 2 ranks by NCCL",
        "tensor parallel by NCCL",
    ]
    assert len(proven(3)) == len(PROOFS)


def test_without_nccl_there_is_what_one_gpu_or_none_can_show() -> None:
    assert proven(1) == proven(0, on_cpu=True)
    assert "training by object store" in proven(1)
    assert proven(0, on_cpu=True, quick=True) == ["environment", "float32 by object store"]


def test_one_gpu_is_shared_by_engine_and_learner() -> None:
    proof = next(proof for proof in PROOFS if proof.kind == "sync")
    config = load_config(RECIPE, overrides(proof, 1))
    assert (config.rollout.gpus_per_actor, config.learner.gpus_per_rank) == (0.5, 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here are GPUs")
def test_without_gpus_it_says_so_in_a_line_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    said = lacks(options())
    assert said.startswith("gpu-check needs GPUs")
    assert "--on-cpu" in said
    assert "\n" not in said
    assert lacks(options(on_cpu=True)) == ""
    assert "config.json" in lacks(options(on_cpu=True, model=Path("/nowhere")))


def test_the_report_counts_shows_and_keeps_all() -> None:
    figures = {"parity mean": 0.001, "parity max": 0.1, "rewards": [0.1, 0.2]}
    result = report(
        {
            "a": Outcome(verdict="passed", figures=figures, seconds=3.4),
            "b": Outcome(verdict="FAILED", why="x" * 500, printed="Traceback"),
            "c": Outcome(verdict="skipped", why="needs 2 GPUs, here are 1"),
        }
    )
    assert result.headline == {"passed": 1, "failed": 1, "skipped": 1}
    assert result.failed == ("b",)
    assert next(row["found"] for row in result.rows) == "parity mean 0.001, parity max 0.1"
    assert len(result.rows[1]["found"]) < 200
    assert result.details["b"]["printed"] == "Traceback"
    assert result.details["a"]["figures"] == figures


def test_other_bytes_in_the_engine_than_by_another_way_are_a_failure() -> None:
    proof = next(proof for proof in PROOFS if proof.equals)

    def outcome(checksum: str) -> Outcome:
        return Outcome(verdict="passed", figures={"checksum": checksum})

    before = {proof.equals: outcome("1")}
    assert gpu_check._compared(proof, outcome("1"), before).verdict == "passed"
    assert gpu_check._compared(proof, outcome("1"), {}).verdict == "passed"
    differs = gpu_check._compared(proof, outcome("2"), before)
    assert (differs.verdict, differs.why) == ("FAILED", f"the engine holds other bytes than after {proof.equals}")


def setting(folder: Path, **given: Any) -> Setting:
    fields = {"kind": "sync", "folder": str(folder), "work": str(folder), "overrides": (), "gpus": 0, "model": None}
    return Setting(**{**fields, "seconds": 60.0, **given})


def test_a_proof_that_fails_says_with_what_and_the_caller_goes_on(tmp_path: Path) -> None:
    outcome = gpu_check._in_a_process(setting(tmp_path, overrides=("rollout.gruop_size=3",)))
    assert outcome.verdict == "FAILED"
    assert outcome.why.startswith("ConfigError: rollout.gruop_size")
    assert "Traceback" in outcome.printed


def test_a_proof_that_hangs_is_ended(tmp_path: Path) -> None:
    outcome = gpu_check._in_a_process(setting(tmp_path, seconds=0.2))
    assert (outcome.verdict, outcome.why) == ("FAILED", "did not end within 0.2 s")
    assert not (tmp_path / FOUND).exists()


def test_a_policy_that_engines_share_out_has_heads_for_each_and_both_policies_are_the_same_next_time(
    tmp_path: Path,
) -> None:
    import json

    for shards in (1, 2):
        old, new = two_policies(tmp_path, None, shards=shards)
        heads = json.loads((old / "config.json").read_text())["num_attention_heads"]
        assert heads % shards == 0
        weights = [(folder / "model.safetensors").read_bytes() for folder in (old, new)]
        assert len(weights[0]) == len(weights[1])
        assert weights[0] != weights[1]
        assert (new / "tokenizer.json").exists()
        again, _ = two_policies(tmp_path / "again", None, shards=shards)
        assert (again / "model.safetensors").read_bytes() == weights[0]
