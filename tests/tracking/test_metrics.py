"""What Prometheus gets of a run, and the dashboard that shows it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from slora_flwr.config import ConfigError
from slora_flwr.wire.messages import Instruction
from tests.support.grids import Grid, Tamper, set_to
from tests.support.resuming import go_on, resumed, stop
from tests.support.runs import (
    Config,
    differ,
    elsewhere,
    events,
    final,
    ledger,
    start,
    summary,
)
from tests.tracking.test_trackers import PRIVATE, warnings

prometheus_client = pytest.importorskip(
    "prometheus_client", reason="the extra metrics is not installed"
)

DASHBOARD = Path(__file__).parents[2] / "docker" / "grafana-dashboard.json"
# Seconds that another process may take, however busy the machine is.
PATIENCE = 300.0
Samples = dict[str, dict[tuple[str, ...], float]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def config(config: Config) -> Config:
    return config | {
        "rounds": 4,
        "clients.per-round": 4,
        "run.metrics-port": free_port(),
    }


def scrape(port: object) -> Samples:
    """Return the samples by name, each by the values of its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


class ScrapingGrid(Grid):
    """A grid that is asked for its run's metrics before each round's first node."""

    def __init__(
        self,
        config: Config,
        nodes: int = 1,
        tampers: Mapping[int, Tamper] | None = None,
    ) -> None:
        super().__init__(config, nodes)
        self._tampers = tampers or {}
        self.scraped: dict[int, Samples] = {}
        self._port = config["run.metrics-port"]

    def before(self, asked: Instruction) -> None:
        if asked.server_round not in self.scraped:
            self.scraped[asked.server_round] = scrape(self._port)


def test_metrics_are_those_of_the_closed_rounds(config: Config) -> None:
    grid = ScrapingGrid(config)
    directory = start(config, grid)
    before, found = grid.scraped[1], grid.scraped[3]
    assert before["slora_rounds_closed_total"] == {(): 0}
    done = events(directory, "round")[1]
    assert found["slora_run_info"] == {("lora", "run"): 1}
    assert found["slora_rounds"] == {(): 4}
    assert found["slora_rounds_closed_total"] == {(): 2}
    assert found["slora_phase"] == {("lora",): 1}
    assert found["slora_clients_asked_total"] == {(): 8}
    assert found["slora_clients_replied_total"] == {(): 8}
    assert found["slora_clients_failed_total"] == {(): 0}
    assert found["slora_train_loss"] == {(): done["train_loss"]}
    assert found["slora_seconds_total"] == {(): done["seconds"]}
    first = events(directory, "round")[0]["seconds"]
    passed = pytest.approx(done["seconds"] - first)
    assert found["slora_round_seconds"] == {(): passed}
    evaluated = found["slora_evaluation"]
    assert evaluated[("accuracy",)] == done["accuracy"]
    assert evaluated[("loss",)] == done["loss"]
    # Of the round that is under way, none has arrived yet.
    rows = [row for row in ledger(directory) if int(row["round"]) <= 2]
    for unit in ("payload", "message"):
        up = sum(int(r[f"{unit}_bytes"]) for r in rows if r["direction"] == "up")
        assert found[f"slora_{unit}_bytes_total"][("up",)] == up
    assert "slora_epsilon" not in found
    with pytest.raises(OSError, match="refused"):  # it ended with its run
        scrape(config["run.metrics-port"])


def test_failures_are_counted(config: Config) -> None:
    config |= {"clients.per-round": 6}
    grid = ScrapingGrid(config, 2, {2: set_to(server_round=9)})
    directory = start(config, grid)
    (event,) = events(directory, "failure")
    assert grid.scraped[2]["slora_clients_failed_total"] == {(): 0}
    failed, replied = len(event["clients"]), 3 * 6 - len(event["clients"])
    assert grid.scraped[4]["slora_clients_failed_total"] == {(): failed}
    assert grid.scraped[4]["slora_clients_replied_total"] == {(): replied}


def test_a_resumed_run_counts_on(config: Config) -> None:
    stop(config, 3)
    grid = ScrapingGrid(config, 2)
    start(resumed(config), grid)
    assert grid.scraped[3]["slora_rounds_closed_total"] == {(): 2}
    assert grid.scraped[3]["slora_clients_replied_total"] == {(): 8}
    assert [*grid.scraped] == [3, 4]


def test_the_port_may_change_and_is_no_reason_to_refuse(config: Config) -> None:
    stop(config, 3)
    directory = go_on(config | {"run.metrics-port": 0})
    assert summary(directory)["rounds"] == 4


@pytest.mark.parametrize("unit", ["client", "example"])
def test_with_privacy_only_what_is_released_is_served(
    config: Config, unit: str
) -> None:
    config |= PRIVATE | {"privacy.unit": unit}
    grid = ScrapingGrid(config)
    directory = start(config, grid)
    # A cohort may be empty, so that its round asks nobody.
    number = max(grid.scraped)
    found = grid.scraped[number]
    assert {*found} == {
        "slora_run_info",
        "slora_rounds",
        "slora_rounds_closed_total",
        "slora_phase",
        "slora_evaluation",
        "slora_epsilon",
    }
    done = events(directory, "round")[number - 2]
    assert found["slora_epsilon"] == {(): done["epsilon"]}
    assert all(not name.startswith("client") for (name,) in found["slora_evaluation"])


def test_a_port_that_is_taken_is_one_warning(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    alone = start(config | {"run.metrics-port": 0}, Grid(config))
    config = elsewhere(config)
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(config["run.metrics-port"])))
        other.listen()
        followed = start(config, Grid(config))
    (told,) = warnings(caplog)
    where = f"127.0.0.1:{config['run.metrics-port']}"
    assert told.startswith(f"run.metrics-port: no metrics are served on {where} (")
    assert not differ(final(alone), final(followed))


def test_the_address_is_loopback_unless_another_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_METRICS_HOST", "127.0.0.2")
    with pytest.raises(OSError, match="refused"):
        start(config, ScrapingGrid(config))  # which looks at 127.0.0.1


def test_a_library_that_is_missing_is_told_before_any_message(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    grid = Grid(config)
    with pytest.raises(ConfigError, match=r"pip install 'slora-flwr\[metrics\]'"):
        start(config, grid)
    assert grid.queried == []


# Grafana's dashboard


def test_the_dashboard_asks_for_metrics_that_there_are(config: Config) -> None:
    grid = ScrapingGrid(config)
    start(config, grid)
    private = elsewhere(config) | PRIVATE
    other = ScrapingGrid(private)
    start(private, other)
    exported = {*grid.scraped[3], *other.scraped[max(other.scraped)]}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"slora_\w+", target["expr"])
    }
    (variable,) = [v for v in dashboard["templating"]["list"] if v["name"] == "run"]
    asked |= {*re.findall(r"slora_\w+", variable["query"])}
    assert asked == exported
    sources = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert sources == {"${datasource}"}


# A real Prometheus


@contextmanager
def prometheus(folder: Path, target: object) -> Iterator[int]:
    """Run a Prometheus that scrapes a port; yield its own port."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    port, config = free_port(), folder / "prometheus.yml"
    job = {
        "job_name": "slora",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{target}"]}],
    }
    config.write_text(json.dumps({"scrape_configs": [job]}))  # JSON is YAML
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def query(port: int, expression: str) -> list[float]:
    """Return the values that Prometheus has of an expression; none if it is not up."""
    asked = urllib.parse.quote(expression)
    address = f"http://127.0.0.1:{port}/api/v1/query?query={asked}"
    try:
        with urllib.request.urlopen(address) as answer:
            found = json.load(answer)["data"]["result"]
    except OSError:
        return []
    return [float(series["value"][1]) for series in found]


class WaitingGrid(Grid):
    """A grid whose last round waits until Prometheus has what there is of others."""

    def __init__(self, config: Config, port: int) -> None:
        super().__init__(config)
        self._at, self._rounds = port, config["rounds"]
        self.found: dict[str, list[float]] = {}

    def before(self, asked: Instruction) -> None:
        if asked.server_round != self._rounds or self.found:
            return
        until = time.monotonic() + PATIENCE
        while query(self._at, "slora_rounds_closed_total") != [3.0]:
            assert time.monotonic() < until, "Prometheus has not scraped"
            time.sleep(0.2)
        for expression in (
            "up",
            "slora_rounds",
            "slora_clients_replied_total",
            'slora_evaluation{metric="accuracy"}',
            'slora_payload_bytes_total{direction="up"}',
            "sum(slora_message_bytes_total) > bool 0",
        ):
            self.found[expression] = query(self._at, expression)


def test_a_real_prometheus_has_the_metrics(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with prometheus(folder, config["run.metrics-port"]) as port:
        grid = WaitingGrid(config, port)
        directory = start(config, grid)
    done = events(directory, "round")[2]
    rows = [row for row in ledger(directory) if int(row["round"]) <= 3]
    up = sum(int(row["payload_bytes"]) for row in rows if row["direction"] == "up")
    assert grid.found == {
        "up": [1.0],
        "slora_rounds": [4.0],
        "slora_clients_replied_total": [12.0],
        'slora_evaluation{metric="accuracy"}': [done["accuracy"]],
        'slora_payload_bytes_total{direction="up"}': [up],
        "sum(slora_message_bytes_total) > bool 0": [1.0],
    }
