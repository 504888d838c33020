"""`ray-rl plan`: what a recipe would do on a cluster that is not there, simulated from measured rates."""
