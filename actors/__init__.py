"""Everything that acts: engines, rollouts, segmentation, value estimation, rewards, the pool."""
