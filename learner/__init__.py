"""Everything that learns: advantages, packing, losses, DeepSpeed, checkpoints, weight publishing."""
