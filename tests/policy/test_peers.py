"""Nodes that know whose keys of a round they accept."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Context

from slora_flwr.config import ConfigError
from slora_flwr.policy.policy import parse_policy
from slora_flwr.secure.identity import ShownKeys
from slora_flwr.secure.keys import PrivateKeys
from slora_flwr.wire.secure_messages import KEYS, Introduction, Letters
from tests.support import own_data
from tests.support.deployment import Deployment
from tests.support.own_data import columns_of, make_own_data_config, nodes_of
from tests.support.own_node import ask, make_config
from tests.support.policy import log_of, policed
from tests.support.processes import LONG
from tests.support.runs import Config, events
from tests.support.secure import SECURE

NAMES = ("a", "b", "c")


@pytest.fixture
def lines(tmp_path: Path) -> dict[str, str]:
    """Return three nodes' public keys; the private ones are in their folders."""
    found = {}
    for name in NAMES:
        (tmp_path / name).mkdir()
        key = Ed25519PrivateKey.generate()
        form = Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        (tmp_path / name / "key").write_bytes(key.private_bytes(*form))
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        found[name] = f"{public.decode()} {name}"
    return found


def policy_of(lines: dict[str, str], peers: Sequence[str]) -> str:
    listed = ", ".join(f'"{lines[name]}"' for name in peers)
    return f'key = "key"\npeers = [{listed}]\n'


@pytest.fixture
def nodes(
    lines: dict[str, str],
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    own_caches: None,
) -> dict[str, Context]:
    """Return nodes of which a and b trust each other and c trusts both."""
    monkeypatch.setenv("SLORA_ASSETS", str(tiny_models["bert"]))
    config: Config = make_config(tiny_models["bert"]) | SECURE
    config |= {"clients.holdout": 0.0, "data.test": "test.csv"}
    peers = {"a": "b", "b": "a", "c": "ab"}
    found = {}
    for name in NAMES:
        notes = own_data.write(
            tmp_path / f"{name}.csv", own_data.texts(0, 40, own_data.KINDS)
        )
        policy = policy_of(lines, peers[name])
        found[name] = policed(tmp_path / name, policy, config, data_path=str(notes))
    return found


def described(node: Context) -> bytes:
    """Return what a node shows of its keys when it joins."""
    keys = ask("query", node).content.config_records["config"][KEYS]
    assert type(keys) is bytes
    return keys


def introduce(node: Context, own: bytes, others: dict[int, bytes]) -> bytes | str:
    """Return the keys that come with a node's letters, or why it refuses."""
    public = ShownKeys.unpack(own).public.pack()
    asked = Introduction(5, 1, 1, 0, public, others).content()
    reply = ask("query.introduce", node, asked)
    if reply.has_error():
        return str(reply.error.reason)
    return Letters.read(reply.content).keys


def test_a_node_shares_secrets_with_its_peers_alone(
    nodes: dict[str, Context], tmp_path: Path
) -> None:
    shown = {name: described(node) for name, node in nodes.items()}
    assert all(len(keys) == 64 + 32 + 64 for keys in shown.values())
    answer = introduce(nodes["a"], shown["a"], {1: shown["b"]})
    assert isinstance(answer, bytes)
    # The keys for the next round are signed as well.
    refusal = introduce(nodes["b"], shown["b"], {1: answer, 2: shown["c"]})
    assert refusal == "it refuses: keys of member 2 are of no trusted peer"
    assert log_of(tmp_path / "b")[-1]["reason"] in refusal
    # They were used up by that, so that b has to join again.
    again = described(nodes["b"])
    assert isinstance(introduce(nodes["b"], again, {1: answer}), bytes)


def test_keys_that_a_server_swaps_are_refused(nodes: dict[str, Context]) -> None:
    shown = {name: described(node) for name, node in nodes.items()}
    invented = PrivateKeys.generate().public.pack() + shown["b"][64:]
    refusal = introduce(nodes["c"], shown["c"], {1: shown["a"], 2: invented})
    assert refusal == ("it refuses: keys of member 2 are not signed by whom they name")
    unsigned = PrivateKeys.generate().public.pack()
    shown["c"] = described(nodes["c"])
    refusal = introduce(nodes["c"], shown["c"], {1: shown["a"], 2: unsigned})
    assert refusal == "it refuses: keys of member 2 are of no trusted peer"


def test_a_key_of_no_use_ends_each_message(
    nodes: dict[str, Context], tmp_path: Path
) -> None:
    (tmp_path / "a" / "key").write_text("nonsense")
    told = "it refuses: its policy or log is of no use; its own log says why"
    assert ask("query", nodes["a"]).error.reason == told


def test_a_list_of_peers_is_checked_when_it_is_read(lines: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="peers: key 2 is no public key"):
        parse_policy({"peers": [lines["a"], "ssh-ed25519 nonsense"]})
    with pytest.raises(ConfigError, match="peers is"):
        parse_policy({"peers": []})


@pytest.mark.sockets
def test_a_run_goes_on_among_those_who_trust_each_other(
    tmp_path: Path, lines: dict[str, str], tiny_models: dict[str, Path]
) -> None:
    """c is trusted by all and trusts only a, so it takes no part in their sums."""
    test = own_data.write(tmp_path / "test.csv", own_data.texts(9, 20, own_data.KINDS))
    config = make_own_data_config(tmp_path, tiny_models["bert"]) | SECURE
    config |= {"method": "lora", "rounds": 1, "clients.deadline": LONG}
    config |= {"clients.min-nodes": 3, "secure.threshold": 0.5}
    config |= {"clients.holdout": 0.0, "data.test": str(test)}
    peers = {"a": "bc", "b": "ac", "c": "a"}
    started = []
    for name, path in zip(NAMES, nodes_of(tmp_path).values(), strict=True):
        policy = tmp_path / name / "policy.toml"
        policy.write_text(policy_of(lines, peers[name]))
        columns = " ".join(f'{k}="{v}"' for k, v in columns_of(path).items())
        started.append(f'name="{name}" {columns} allowed-folders="/" policy="{policy}"')
    deployment = Deployment(started)
    try:
        deployment.start()
        run = deployment.run(config)
        run.stream.wait(LONG)
        assert deployment.status(run) == "finished:completed"
        logged = "".join(path.read_text() for path in deployment.logs())
        assert "was introduced to members" in logged
    finally:
        deployment.close()
    directory = Path(str(config["run.dir"]))
    assert [event["replied"] for event in events(directory, "round")] == [2]
    reasons = {event["reason"] for event in events(directory, "failure")}
    assert len(reasons) == 1
    assert "are of no trusted peer" in reasons.pop()
