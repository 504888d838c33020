import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.versus_trl import Run, make_endless
from ray_rl.embedded import policy_path
from ray_rl.tokenizer import load_tokenizer


def test_an_endless_policy_differs_in_its_end_of_sequence_alone(tmp_path, monkeypatch):
    folder = tmp_path / "endless"
    monkeypatch.chdir(policy_path().parent)
    make_endless(Path(policy_path().name), folder, "<unk>")
    policy, endless = load_tokenizer(str(policy_path())), load_tokenizer(str(folder))
    assert policy.tokenizer.convert_ids_to_tokens(policy.eos_token_ids()) == ["<eos>"]
    assert endless.tokenizer.convert_ids_to_tokens(endless.eos_token_ids()) == ["<unk>"]
    assert endless.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert (folder / "model.safetensors").samefile(policy_path() / "model.safetensors")


def test_a_run_is_told_by_its_steps_after_the_first_and_by_its_last_rewards():
    run = Run(seconds=[9.0, 1.0, 2.0, 4.0], rewards=[0.0] * 6 + [0.5, 1.0], peak_gib=1.0)
    assert run.step_seconds == 2.0
    assert run.late_reward == 0.75


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_one_line_says_how_to_get_it():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "versus-trl"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: versus-trl needs trl==1.16.0, which is not installed: pip install trl==1.16.0"
    )
