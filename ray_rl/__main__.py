"""`python -m ray_rl` is `ray-rl`."""

from ray_rl.cli import main

main()
