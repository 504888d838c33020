"""Which method learns most from the same updates, tokens and seconds: `ray-rl bench learn`."""
