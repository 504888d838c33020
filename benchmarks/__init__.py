"""The benchmark suite, run as a program: `ray-rl bench` or `python -m benchmarks`."""
