"""A SuperNode with a policy, in a real deployment."""

from pathlib import Path

import pytest

from slora_flwr.policy.audit import read_log
from tests.support.deployment import Deployment
from tests.support.own_data import make_own_data_config, nodes_of
from tests.support.processes import LONG

pytestmark = pytest.mark.sockets


def test_a_node_refuses_a_run_and_the_servers_log_says_why(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """The others go on without it; the next run, which it allows, has it."""
    config = make_own_data_config(tmp_path, tiny_models["bert"])
    config |= {"method": "lora", "rounds": 1, "clients.deadline": LONG}
    config |= {"clients.min-replies": 1, "clients.min-nodes": 2}
    policies = {"a": "", "b": "", "c": "fewest.rounds = 2"}
    nodes = []
    for name, path in nodes_of(tmp_path).items():
        policy = tmp_path / f"{name}.toml"
        policy.write_text(f'state = "of-{name}"\n{policies[name]}')
        nodes.append(
            f'name="{name}" data-path="{path}" data-text="text" data-label="label" '
            f'allowed-folders="/" policy="{policy}"'
        )
    deployment = Deployment(nodes)
    try:
        deployment.start()
        for rounds in (1, 2):
            # As many clients as there are nodes that take part.
            config |= {"rounds": rounds, "clients.per-round": 1 + rounds}
            run = deployment.run(config | {"run.dir": str(tmp_path / f"run-{rounds}")})
            run.stream.wait(LONG)
            assert deployment.status(run) == "finished:completed"
            told = "fewest.rounds of its policy: rounds is 1; allowed: at least 2"
            logged = "".join(path.read_text() for path in deployment.logs())
            assert f"it refuses: {told}" in logged
    finally:
        deployment.close()
    for name, known in (("a", {"1", "2"}), ("c", {"2"})):
        lines = [entry for entry, _ in read_log(tmp_path / f"of-{name}")]
        runs = [*dict.fromkeys(line["run"] for line in lines)]
        assert len(runs) == 2
        trained = {
            str(1 + runs.index(line["run"]))
            for line in lines
            if (line["kind"], line["event"]) == ("train", "answered")
        }
        assert trained == known
