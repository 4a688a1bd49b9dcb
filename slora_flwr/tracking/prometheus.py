"""Metrics of a run for Prometheus, over HTTP while the run goes on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import INFO, WARNING

from flwr.common.logger import log
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slora_flwr.config import RunConfig
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import ClientsFailed, Event, RecordedRound
from slora_flwr.tracking.figures import DIRECTIONS, is_private

LOOPBACK = "127.0.0.1"


class RunMetrics(Collector):
    """What Prometheus gets of a run; docs/guides/tracking.md has the names.

    Parameters
    ----------
    config : RunConfig
        The run. With privacy, what depends on who was drawn is left out.
    directory : RunDirectory
        Its directory, whose ledger counts the bytes.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config, self._directory = config, directory
        self._last: RecordedRound | None = None
        self._before = 0.0  # seconds from the run's start to the last round but one
        self._asked = self._replied = self._failed = 0
        self._evaluated: dict[str, float] = {}

    def follow(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, ClientsFailed):
            self._failed += len(event.clients)
        if isinstance(event, RecordedRound):
            self._before = 0.0 if self._last is None else self._last.seconds
            self._asked += len(event.cohort)
            self._replied += event.replied
            if event.metrics:
                self._evaluated = event.metrics
            self._last = replace(event, cohort=[], clients={}, classes=None)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        config, last = self._config, self._last
        about = {"run": self._directory.path.name, "method": config.method}
        yield InfoMetricFamily("slora_run", "The run and its method.", about)
        yield GaugeMetricFamily(
            "slora_rounds", "Rounds of the whole run.", config.rounds
        )
        yield CounterMetricFamily(
            "slora_rounds_closed", "Closed rounds.", last.round if last else 0
        )
        if last is not None:
            yield _labelled(
                GaugeMetricFamily(
                    "slora_phase", "1 for the phase of the last round.", labels=["name"]
                ),
                {last.phase: 1},
            )
        yield _labelled(
            GaugeMetricFamily(
                "slora_evaluation", "The last evaluation.", labels=["metric"]
            ),
            self._evaluated,
        )
        if last is not None and last.epsilon is not None:
            yield GaugeMetricFamily(
                "slora_epsilon", "Epsilon spent so far.", last.epsilon
            )
        if not is_private(config):
            yield from self._of_clients()

    def _of_clients(self) -> Iterator[Metric]:
        """Yield what depends on who was drawn."""
        last = self._last
        for name, told, number in (
            ("asked", "Clients asked to train, in closed rounds.", self._asked),
            ("replied", "Clients whose updates were taken.", self._replied),
            ("failed", "Clients left out, in all rounds.", self._failed),
        ):
            yield CounterMetricFamily(f"slora_clients_{name}", told, number)
        for unit, told in (
            ("payload", "Bytes of the tensors."),
            ("message", "Bytes of the messages that were sent."),
        ):
            total = self._directory.ledger.total
            yield _labelled(
                CounterMetricFamily(f"slora_{unit}_bytes", told, labels=["direction"]),
                {way: total(unit, way) for way in DIRECTIONS},
            )
        if last is not None:
            yield CounterMetricFamily(
                "slora_seconds", "Seconds of the closed rounds.", last.seconds
            )
            yield GaugeMetricFamily(
                "slora_round_seconds",
                "Seconds of the last round.",
                last.seconds - self._before,
            )
            if last.train_loss is not None:
                yield GaugeMetricFamily(
                    "slora_train_loss", "Mean loss of the last round.", last.train_loss
                )


@contextmanager
def serving(metrics: RunMetrics, port: int) -> Iterator[None]:
    """Serve metrics on a port of this machine; do without if it is taken.

    The environment variable SLORA_METRICS_HOST names another address to listen on.
    """
    host = os.environ.get("SLORA_METRICS_HOST") or LOOPBACK
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        told = "run.metrics-port: no metrics are served on %s:%d (%s)"
        log(WARNING, told, host, port, error)
        yield
        return
    log(INFO, "metrics for Prometheus: http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _labelled(
    family: CounterMetricFamily | GaugeMetricFamily, values: dict[str, float]
) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
