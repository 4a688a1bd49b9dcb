"""Faults of a real deployment, and what comes of them, bit for bit."""

import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.training.trainer import ClientError, ClientUpdate, Trainer
from tests.support.deployment import Deployment, Run
from tests.support.processes import wait_until
from tests.support.resuming import assert_same, resumed, without
from tests.support.runs import (
    CLIENTS,
    Config,
    differ,
    elsewhere,
    events,
    final,
    make_config,
    start,
    summary,
)

# For machines on which every process takes its time.
pytestmark = [pytest.mark.sockets, pytest.mark.timeout(900)]
# Seconds that no round takes.
LONG = 300.0


def make(corpus: Path, models: dict[str, Path], directory: Path) -> Config:
    config = make_config(corpus, models["bert"], directory)
    config |= {"method": "slora", "rounds": 6, "sparse.rounds": 3}
    return config | {"clients.min-nodes": 2, "clients.deadline": LONG}


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    return make(corpus, tiny_models, tmp_path / "run")


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    deployment = Deployment()
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.close()


@pytest.fixture(scope="module")
def whole(
    deployment: Deployment,
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Give the directory of a run that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(deployment, deployment.run(make(corpus, tiny_models, directory)))
    return directory


def finish(deployment: Deployment, run: Run) -> None:
    """Wait for a run's good end."""
    run.stream.wait(400)
    assert deployment.status(run) == "finished:completed"


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def failures(run: Run) -> list[tuple[int, list[int]]]:
    return [(event["round"], event["clients"]) for event in run.events("failure")]


def replay(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hold the same rounds in this process, in which the same clients fail.

    They fail each by itself, so that a round's mean is that of the others.
    """
    answered = {e["round"]: {int(c) for c in e["clients"]} for e in run.events("round")}
    train_client = Trainer.train_client

    def fail(
        self: Trainer, client: int, state: Any, phase: Any, server_round: int
    ) -> ClientUpdate:
        if client not in answered[server_round]:
            raise ClientError("it failed there")
        return train_client(self, client, state, phase, server_round)

    monkeypatch.setattr(Trainer, "train_client", fail)
    config = elsewhere(config, **{"clients.min-nodes": 1})
    return start(config, InlineGrid(config))


def assert_same_end(run: Run, expected: Path) -> None:
    """Compare what is promised of runs in which clients failed."""
    for name in ("last", "best", "base"):
        one, other = final(run.directory, name), final(expected, name)
        assert one.keys() == other.keys()
        assert not differ(one, other), name
    figures = ("accuracy", "macro_f1", "loss", "payload_bytes_up", "payload_bytes_down")
    ours, theirs = summary(run.directory), summary(expected)
    assert [ours[f] for f in figures] == [theirs[f] for f in figures]
    for one, other in zip(run.events("round"), events(expected, "round"), strict=True):
        assert one["cohort"] == CLIENTS
        assert without(one) == without(other)


def test_a_deployment_gives_the_inline_engines_result(
    whole: Path, config: Config
) -> None:
    assert_same(start(config, InlineGrid(config, nodes=2)), whole)


def test_a_run_whose_serverapp_is_killed_in_either_phase_goes_on_from_its_checkpoint(
    deployment: Deployment, whole: Path, config: Config
) -> None:
    draw = random.Random(4)
    first = run = deployment.run(config)
    for last in (1, 4):  # the sparse phase has three rounds
        run.wait_for_round(last)
        time.sleep(draw.uniform(0.0, 1.0))
        deployment.kill_serverapp(run)
        run = deployment.run(resumed(config))
    finish(deployment, run)
    resumptions = [event["round"] for event in run.events("resumed")]
    assert resumptions[0] in (1, 2)
    assert resumptions[1] in (4, 5)
    assert_same(run.directory, whole)
    # Flower tells by the heartbeats, which no longer come.
    wait_until(lambda: deployment.status(first) == "finished:failed", 70)


def test_a_run_whose_superlink_is_killed_with_its_serverapp_goes_on_from_its_checkpoint(
    deployment: Deployment, whole: Path, config: Config
) -> None:
    for node in deployment.nodes:
        node.err({2: "waits"})
    run = deployment.run(config)
    for node in deployment.nodes:
        node.wait_until_it_trains(run, 2)
    [serverapp] = deployment.serverapps()
    deployment.kill_superlink()
    wait_until(lambda: has_ended(serverapp), 60)
    for node in deployment.nodes:
        node.err({})
    deployment.start_superlink(separate=True)
    second = deployment.run(resumed(config))
    finish(deployment, second)
    assert [event["round"] for event in second.events("resumed")] == [1]
    assert_same(second.directory, whole)
    # Flower tells by the heartbeats, which no longer come.
    wait_until(lambda: deployment.status(run) == "finished:failed", 120)


def test_a_run_beside_a_killed_superlink_goes_on_by_itself(
    deployment: Deployment, whole: Path, config: Config
) -> None:
    if deployment.superexec is None:
        deployment.kill_superlink()
        deployment.start_superlink(separate=True)
    for node in deployment.nodes:
        node.err({2: "waits", 5: "waits"})
    run = deployment.run(config)
    for number in (2, 5):
        for node in deployment.nodes:
            node.wait_until_it_trains(run, number)
        deployment.kill_superlink()
        for node in deployment.nodes:
            node.err({5: "waits"} if number == 2 else {})
        time.sleep(1.0)
        deployment.start_superlink(separate=True)
        began = time.monotonic()
        run.wait_for_round(number)
        assert time.monotonic() - began < 60
    wait_until(lambda: (run.directory / "summary.json").exists(), 120)
    wait_until(lambda: not deployment.serverapps(), 60)
    assert deployment.status(run) == "finished:completed"
    assert_same(run.directory, whole)


def test_a_killed_node_is_left_out_once_and_comes_back(
    deployment: Deployment, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"rounds": 14, "sparse.rounds": 6}
    node = deployment.nodes[1]
    node.err({2: "waits"})
    run = deployment.run(config)
    node.wait_until_it_trains(run, 2)
    node.kill()
    node.err({})
    began = time.monotonic()
    node.start()
    run.wait_for_round(2)
    assert 20 < time.monotonic() - began < 75
    finish(deployment, run)
    [(number, clients)] = failures(run)
    assert (number, len(clients)) == (2, 3)
    assert "Sending: train" in node.log_of(run, 14)
    assert_same_end(run, replay(run, config, monkeypatch))


def test_a_node_that_hangs_is_left_out_and_its_late_reply_does_nothing(
    deployment: Deployment,
    whole: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The nodes' first description of themselves has no more time than a round.
    deadline = 2 * events(whole, "round")[0]["seconds"]
    config |= {"rounds": 10, "sparse.rounds": 4, "clients.deadline": deadline}
    node = deployment.nodes[1]
    node.err({2: "waits"})
    run = deployment.run(config)
    node.wait_until_it_trains(run, 2)
    node.signal(signal.SIGSTOP)
    node.err({})
    run.wait_for_round(2)
    assert "Sending" not in node.log_of(run, 2)
    node.signal(signal.SIGCONT)
    wait_until(lambda: "Sending: train" in node.log_of(run, 2))
    assert 10 not in run.rounds()
    finish(deployment, run)
    [failure] = run.events("failure")
    assert (failure["round"], len(failure["clients"])) == (2, 3)
    # Whatever ends first: the round, its message, or Flower's patience with the node.
    told = "no reply before the deadline|Message Unavailable|Node Unavailable"
    assert re.search(told, failure["reason"])
    assert "Sending: train" in node.log_of(run, 10)
    assert_same_end(run, replay(run, config, monkeypatch))


def test_what_a_node_answers_wrongly_or_twice_is_not_counted(
    deployment: Deployment, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"rounds": 8}
    node = deployment.nodes[1]
    node.err(
        {2: "stale", 4: "other-phase", 5: "raises", 6: "dies", 7: "twice"},
    )
    run = deployment.run(config)
    finish(deployment, run)
    node.err({})
    assert {number: len(clients) for number, clients in failures(run)} == {
        2: 3,
        4: 3,
        5: 3,
        6: 3,
    }
    reasons = [event["reason"] for event in run.events("failure")]
    assert reasons[0] == "its round is 1, not 2"
    assert reasons[1] == "its phase is 0, not 1"
    assert "RuntimeError'>:<'this client fails'>" in reasons[2]
    assert "two resident workers ended in the middle of this message" in reasons[3]
    assert "duplicate reply for reply_to_message_id" in deployment.log()
    assert_same_end(run, replay(run, config, monkeypatch))
