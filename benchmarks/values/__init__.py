"""How well state values are estimated, at which price: `ray-rl bench values`."""
