"""What ships with the package so that a first run needs nothing else: the embedded policy."""

from __future__ import annotations

from pathlib import Path


def policy_path() -> Path:
    """Folder of the embedded policy: 1 M parameters, Hugging Face format, warm-started on `ray_rl.tasks.arithmetic`.

    Made, and made again, by ``python -m learner.warm_start ray_rl/embedded/policy``.
    """
    return Path(__file__).resolve().parent / "policy"
