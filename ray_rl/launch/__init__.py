"""The composition root: makes the actors and the learner of a configuration and runs them.

The only rooms of `ray_rl` that import actors and learner. Everything that is started here is ended here.
"""

from ray_rl.launch.prepared import Prepared, model_source
from ray_rl.launch.runs import evaluate_policy, train

__all__ = ["Prepared", "evaluate_policy", "model_source", "train"]
