"""ray-rl: reinforcement learning of language models with verifiable rewards, without a value network."""
