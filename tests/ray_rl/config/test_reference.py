"""The shipped reference is what the models say."""

from ray_rl.config.reference import REFERENCE_FILE, reference


def test_the_reference_is_fresh():
    assert REFERENCE_FILE.read_text(encoding="utf-8") == reference(), "run: python -m ray_rl.config.reference"


def test_types_constraints_defaults_and_docstrings_are_told():
    text = reference()
    assert "| `rollout.group_size` | integer, ≥ 1 | `8` | G, completions per prompt. |" in text
    assert "| `task.path` | text, length ≥ 1 | required |" in text
    assert "| `learner.optimizer.betas` | list of number | `[0.9, 0.999]` |" in text
    assert "## `values` with `kind: fixed` (default)" in text
    assert "## `learner.kl`" in text
