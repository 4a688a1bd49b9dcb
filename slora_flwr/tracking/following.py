"""All that follows a run, from its directory to its end."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.tracking.base import Tracker
from slora_flwr.tracking.choice import find_trackers


@dataclass(frozen=True)
class Following:
    """What is to follow a run; its libraries are there.

    Attributes
    ----------
    config : RunConfig
        The run.
    kinds : Mapping[str, type[Tracker]]
        Its trackers, by name.
    """

    config: RunConfig
    kinds: Mapping[str, type[Tracker]]

    @classmethod
    def of(cls, config: RunConfig) -> "Following":
        """Return what a run config names.

        Raises
        ------
        ConfigError
            If a library is not installed.
        """
        if port := config.run.metrics_port:
            try:
                import prometheus_client  # noqa: F401
            except ImportError as error:
                raise ConfigError(
                    f"run.metrics-port is {port}, and prometheus-client cannot be "
                    f"imported ({error}); allowed: 0, or pip install "
                    "'slora-flwr[metrics]'"
                ) from error
        return cls(config, find_trackers(config))

    @contextmanager
    def begin(self, directory: RunDirectory, after: int = 0) -> Iterator[None]:
        """Follow a run until it ends.

        Parameters
        ----------
        directory : RunDirectory
            The run's directory.
        after : int
            The round after which the run goes on; 0 for a new run.
        """
        with ExitStack() as held:
            if port := self.config.run.metrics_port:
                from slora_flwr.tracking.prometheus import RunMetrics, serving

                metrics = RunMetrics(self.config, directory)
                directory.follow(metrics.follow)
                held.enter_context(serving(metrics, port))
            if not self.kinds:
                yield
                return
            # Imported here, since it draws charts at the end: half a second.
            from slora_flwr.tracking.trackers import Trackers

            trackers = Trackers(self.kinds, self.config, directory, after)
            directory.follow(trackers.follow)
            try:
                yield
            except BaseException:
                trackers.end(completed=False)
                raise
            trackers.end(completed=True)
