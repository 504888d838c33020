"""The configuration of a run: pydantic sections, one file each, composed in `ray_rl.config.run.RunConfig`."""

from ray_rl.config.load import load_config, resolve_config
from ray_rl.config.run import RunConfig
from ray_rl.errors import ConfigError

__all__ = ["ConfigError", "RunConfig", "load_config", "resolve_config"]
