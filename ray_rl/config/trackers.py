"""Where metrics may also go: experiment trackers, each with its own library and its own server."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ray_rl.config.section import Section


class WandbTracker(Section):
    """Weights & Biases (`pip install wandb`). Its key comes from WANDB_API_KEY or `wandb login`."""

    kind: Literal["wandb"] = "wandb"
    project: str = "ray-rl"
    name: str | None = None
    """Of the run there. Unset: that of the run's folder."""
    tags: tuple[str, ...] = ()
    entity: str | None = None
    """User or team. Unset: the account's default."""
    offline: bool = False
    """Only write into `trackers/` in the run's folder; `wandb sync` uploads it later."""


class TrackioTracker(Section):
    """Trackio (`pip install trackio`), which writes into a folder of this machine (TRACKIO_DIR) or to a Hugging Face space."""

    kind: Literal["trackio"] = "trackio"
    project: str = "ray-rl"
    name: str | None = None
    """Of the run there. Unset: that of the run's folder."""
    space_id: str | None = None
    """A Hugging Face space, `user/name`; the token comes from HF_TOKEN. Unset: this machine."""


class MlflowTracker(Section):
    """MLflow (`pip install mlflow-skinny`). MLFLOW_TRACKING_USERNAME and the like come from the environment."""

    kind: Literal["mlflow"] = "mlflow"
    project: str = "ray-rl"
    """The experiment there."""
    name: str | None = None
    """Of the run there. Unset: that of the run's folder."""
    tags: tuple[str, ...] = ()
    """`key=value`, or a key alone."""
    tracking_uri: str | None = None
    """Server or store. Unset: MLFLOW_TRACKING_URI, or what MLflow itself takes."""


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


TrackerConfig = Annotated[
    Annotated[WandbTracker | TrackioTracker | MlflowTracker, Field(discriminator="kind")], BeforeValidator(_by_name)
]
"""One tracker: a mapping with its `kind`, or the kind alone."""
