"""The trackers by their names, which are those of their libraries and extras."""

from importlib import import_module

from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.tracking.base import Tracker

TRACKERS = {
    "tensorboard": "TensorBoardTracker",
    "wandb": "WandbTracker",
    "trackio": "TrackioTracker",
    "mlflow": "MlflowTracker",
}


def find_trackers(config: RunConfig) -> dict[str, type[Tracker]]:
    """Return the trackers that a run config names, by name.

    Raises
    ------
    ConfigError
        If a library is not installed.
    """
    found: dict[str, type[Tracker]] = {}
    for name in config.trackers:
        try:
            module = import_module(f"slora_flwr.tracking.{name}")
        except ImportError as error:
            raise ConfigError(
                f"track is {config.track!r}, and {name} cannot be imported ({error}); "
                f"allowed: others, or pip install 'slora-flwr[{name}]'"
            ) from error
        found[name] = getattr(module, TRACKERS[name])
    return found
