"""Faults of a real deployment, and what comes of them, bit for bit."""

import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.runs.reader import read_run
from slora_flwr.training.trainer import ClientError, ClientUpdate, Trainer
from tests.support.deployment import Deployment, Node, Run
from tests.support.own_data import make_own_data_config, nodes_of
from tests.support.processes import LONG, has_ended, wait_until
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
from tests.support.secure import SECURE

pytestmark = pytest.mark.sockets


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
    """Return the directory of a run that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(deployment, deployment.run(make(corpus, tiny_models, directory)))
    return directory


def finish(deployment: Deployment, run: Run) -> None:
    """Wait for a run's good end."""
    run.stream.wait(LONG)
    assert deployment.status(run) == "finished:completed"


def wait_until_it_takes_part(deployment: Deployment, run: Run, asked: int) -> None:
    """Let the second node describe itself once more; the first waits in two rounds."""
    first, second = deployment.nodes
    wait_until(lambda: deployment.online() == 2)
    first.err({4: "waits"})  # it is asked before round 4 at the latest
    wait_until(lambda: second.count(run, "sends query") > asked)
    first.err({})


def failures(run: Run) -> list[tuple[int, list[int]]]:
    return [(event["round"], event["clients"]) for event in run.events("failure")]


def replay(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hold the same rounds in this process, in which the same clients fail.

    They fail each by itself, so that a round's mean is that of the others.
    """
    answered = {e["round"]: {int(c) for c in e["clients"]} for e in run.events("round")}
    train_client = Trainer.train_client

    def fail(
        self: Trainer,
        client: int,
        state: Any,
        phase: Any,
        server_round: int,
        *until: float,
    ) -> ClientUpdate:
        if client not in answered[server_round]:
            raise ClientError("it failed there")
        return train_client(self, client, state, phase, server_round, *until)

    monkeypatch.setattr(Trainer, "train_client", fail)
    config = elsewhere(config, **{"clients.min-nodes": 1})
    return start(config, InlineGrid(config))


def assert_same_end(run: Run, expected: Path) -> None:
    """Compare what is promised of runs in which clients failed."""
    for name in ("last", "averaged", "best", "base"):
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
    assert read_run(whole).engine.name == "deployment"


def test_secure_sums_of_a_deployment_are_the_inline_engines(
    deployment: Deployment, config: Config
) -> None:
    config |= SECURE | {"rounds": 2, "sparse.rounds": 1}
    run = deployment.run(config)
    finish(deployment, run)
    inline = elsewhere(config)
    assert_same(run.directory, start(inline, InlineGrid(inline, nodes=2)))
    assert all(not done["clients"] for done in run.events("round"))


def test_a_run_whose_serverapp_is_killed_in_either_phase_goes_on_from_its_checkpoint(
    deployment: Deployment, whole: Path, config: Config
) -> None:
    draw = random.Random(4)

    def wait_in(faults: dict[int, str]) -> None:
        for node in deployment.nodes:
            node.err(faults)

    wait_in({3: "waits"})
    first = run = deployment.run(config)
    for last in (1, 4):  # the sparse phase has three rounds
        run.wait_for_round(last)
        time.sleep(draw.uniform(0.0, 1.0))
        deployment.kill_serverapp(run)
        wait_in({6: "waits"} if last == 1 else {})
        run = deployment.run(resumed(config))
    finish(deployment, run)
    resumptions = [event["round"] for event in run.events("resumed")]
    assert resumptions[0] in (1, 2)
    assert resumptions[1] in (4, 5)
    assert_same(run.directory, whole)
    # Flower tells by the heartbeats, which no longer come.
    wait_until(lambda: deployment.status(first) == "finished:failed")


def test_a_run_whose_superlink_is_killed_with_its_serverapp_goes_on_from_its_checkpoint(
    deployment: Deployment, whole: Path, config: Config
) -> None:
    for node in deployment.nodes:
        node.err({2: "waits"})
    run = deployment.run(config)
    for node in deployment.nodes:
        node.wait_until_it_trains(run, 2)
    serverapp = deployment.serverapp()
    deployment.kill_superlink()
    wait_until(lambda: has_ended(serverapp))
    for node in deployment.nodes:
        node.err({})
    deployment.start_superlink(separate=True)
    second = deployment.run(resumed(config))
    finish(deployment, second)
    assert [event["round"] for event in second.events("resumed")] == [1]
    assert_same(second.directory, whole)
    # Flower tells by the heartbeats, which no longer come.
    wait_until(lambda: deployment.status(run) == "finished:failed")


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
        run.wait_for_round(number)
    wait_until(lambda: (run.directory / "summary.json").exists())
    wait_until(lambda: not deployment.serverapps())
    assert deployment.status(run) == "finished:completed"
    assert_same(run.directory, whole)


def test_a_killed_node_is_left_out_once_and_comes_back(
    deployment: Deployment, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, node = deployment.nodes
    node.err({2: "waits"})
    other.err({3: "waits", 4: "waits"})
    run = deployment.run(config)
    node.wait_until_it_trains(run, 2)
    asked = node.count(run, "sends query")
    node.kill()
    node.err({})
    node.start()
    run.wait_for_round(2)
    wait_until_it_takes_part(deployment, run, asked)
    finish(deployment, run)
    [failure] = run.events("failure")
    assert (failure["round"], len(failure["clients"])) == (2, 3)
    # The round did not last until its deadline.
    assert re.search("Message Unavailable|Node Unavailable", failure["reason"])
    assert node.count(run, "sends train 2") == 0
    assert node.count(run, "sends train 6") == 1
    assert_same_end(run, replay(run, config, monkeypatch))


def test_nodes_remove_what_they_kept_when_a_run_ends(
    deployment: Deployment, config: Config
) -> None:
    def kept(node: Node) -> list[Path]:
        return [*(node.folder / "home" / "cache").glob("run-*/*")]

    for node in deployment.nodes:
        node.err({6: "waits"})
    run = deployment.run(config)
    for node in deployment.nodes:
        node.wait_until_it_trains(run, 6)
        assert any(path.name.startswith("base-") for path in kept(node))
        node.err({})
    finish(deployment, run)
    assert not any(map(kept, deployment.nodes))


def test_a_node_that_hangs_is_left_out_and_its_late_reply_does_nothing(
    deployment: Deployment, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, node = deployment.nodes
    node.err({2: "waits"})
    other.err({3: "waits", 4: "waits"})
    run = deployment.run(config)
    node.wait_until_it_trains(run, 2)
    other.wait_until_it_sends(run, 2)
    asked = node.count(run, "sends query")
    node.signal(signal.SIGSTOP)
    node.err({})
    deployment.late.touch()
    run.wait_for_round(2)
    deployment.late.unlink()
    assert node.count(run, "sends train 2") == 0
    node.signal(signal.SIGCONT)
    node.wait_until_it_sends(run, 2)
    assert 3 not in run.rounds()
    wait_until_it_takes_part(deployment, run, asked)
    finish(deployment, run)
    [failure] = run.events("failure")
    assert (failure["round"], len(failure["clients"])) == (2, 3)
    # Whatever ends first: the round, its message, or Flower's patience with the node.
    told = "no reply before the deadline|Message Unavailable|Node Unavailable"
    assert re.search(told, failure["reason"])
    assert node.count(run, "sends train 6") == 1
    assert_same_end(run, replay(run, config, monkeypatch))


def test_what_a_node_answers_wrongly_or_twice_is_not_counted(
    deployment: Deployment, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"rounds": 8}
    other, node = deployment.nodes
    node.err({2: "stale", 4: "other-phase", 5: "raises", 6: "dies", 7: "twice"})
    other.err({8: "waits"})
    run = deployment.run(config)
    # Both times while the run is on.
    node.wait_until_it_sends(run, 7, times=2)
    for one in deployment.nodes:
        one.err({})
    finish(deployment, run)
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
    assert_same_end(run, replay(run, config, monkeypatch))


def test_nodes_have_the_names_that_they_are_registered_under(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """And by which `certs.sh` registered them, whatever they say themselves."""
    config = make_own_data_config(tmp_path, tiny_models["bert"])
    config |= {"method": "lora", "rounds": 1, "clients.deadline": LONG}
    names = ["st-mary", "st-luke", "st-anne"]
    said = [names[1], names[1], "c"]
    deployment = Deployment(
        [
            f'name="{name}" data-path="{path}" data-text="text" data-label="label" '
            f'allowed-folders="/"'
            for name, path in zip(said, nodes_of(tmp_path).values(), strict=True)
        ],
        registered=names,
    )
    try:
        deployment.start()
        run = deployment.run(config)
        finish(deployment, run)
        logged = "".join(path.read_text() for path in deployment.logs())
    finally:
        deployment.close()
    joined = {event["name"]: event for event in run.events("node")}
    # In the order of names, 40 rows of "st-mary" being of apples and bridges.
    assert [joined[name]["client"] for name in names] == [2, 1, 0]
    assert [joined[name]["examples"] for name in names] == [40, 30, 50]
    for name in names:
        assert f"{name} (node {joined[name]['node']}) is client" in logged
    evaluated = {event["name"] for event in run.events("evaluation")}
    assert evaluated == {f"{n} (node {e['node']})" for n, e in joined.items()}
