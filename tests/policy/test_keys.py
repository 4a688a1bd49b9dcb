"""Each key of a policy, by what a node answers to a server that asks for more."""

from pathlib import Path

import pytest
from flwr.app import Array, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto

from slora_flwr.client.process import SharedContext, make_process
from slora_flwr.common.code_digest import code_digest
from slora_flwr.common.files import cache_folder
from slora_flwr.config import list_keys
from slora_flwr.policy.ledger import Ledger
from slora_flwr.policy.policy import Most, list_policy_keys, parse_policy
from slora_flwr.privacy.accountant import Release
from slora_flwr.wire.messages import Instruction, message_bytes, write_lineage
from slora_flwr.wire.secure_messages import Introduction, Question
from tests.support import own_data
from tests.support.own_node import MASKED, a_node, ask, first_instruction, make_config
from tests.support.policy import KINDS, NOWHERE, by_hand, log_of, policed
from tests.support.runs import Config
from tests.support.secure import SECURE

pytestmark = pytest.mark.usefixtures("own_caches")

LABELS = own_data.KINDS


@pytest.fixture
def config(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("SLORA_ASSETS", str(tiny_models["bert"]))
    return make_config(tiny_models["bert"])


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Forty texts of the node's own."""
    return own_data.write(tmp_path / "notes.csv", own_data.texts(0, 40, LABELS))


NEVER = "0" * 32
PEER = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c"
)
# By key: a policy, and the words with which it refuses `make_config`; then a policy
# that allows it.
REFUSALS = {
    "models": (
        'models = ["embedded", "/srv/models/*"]',
        "model.name is '{model}'; allowed: embedded",
        'models = ["embedded", "{model}"]',
    ),
    "columns": (
        'columns = ["text", "title"]',
        "this node's config names others; allowed: text, title",
        'columns = ["text", "label"]',
    ),
    "methods": (
        'methods = ["lora", "slora"]',
        "method is 'fft'; allowed: lora, slora",
        'methods = ["lora", "fft"]',
    ),
    "tasks": (
        'tasks = ["causal-lm"]',
        "task is 'classification'; allowed: causal-lm",
        'tasks = ["classification"]',
    ),
    "code": (
        f'code = ["{NEVER}"]',
        f"its digest is {code_digest()}; allowed: {NEVER}",
        f'code = ["{NEVER}", "{code_digest()}"]',
    ),
    "secure-aggregation": (
        "secure-aggregation = true",
        "secure.aggregation is false; allowed: true",
        "secure-aggregation = false",
    ),
    "fewest.rounds": (
        "fewest.rounds = 13",
        "rounds is 12; allowed: at least 13",
        "fewest.rounds = 12",
    ),
    "fewest.clients": (
        "fewest.clients = 6",
        "clients.per-round is 5; allowed: at least 6; fewest.clients of its policy: "
        "clients.min-replies is 1; allowed: at least 6",
        "fewest.clients = 1",
    ),
    "fewest.members": (
        "fewest.members = 3",
        "secure.aggregation is false; allowed: true",
        "",
    ),
    "peers": (
        f'peers = ["{PEER}"]',
        "secure.aggregation is false; allowed: true",
        "",
    ),
    "most.bytes": (
        "most.bytes = 0",
        "too little is left of what all runs together may use; allowed: 0 in all",
        "most.bytes = 1",
    ),
    "most.epsilon": (
        "most.epsilon = 8",
        "the run has no privacy of single examples; allowed: privacy.unit 'example', "
        "with privacy.epsilon or a noise multiplier",
        "",
    ),
    "ranges.train.epochs": (
        'ranges."train.epochs" = {least = 2, most = 3}',
        "it is 1; allowed: 2 to 3",
        'ranges."train.epochs" = {least = 1, most = 1}',
    ),
    "allowed.upload.dtype": (
        'allowed."upload.dtype" = ["int8", "int4"]',
        "it is 'float32'; allowed: 'int8', 'int4'",
        'allowed."upload.dtype" = ["float32"]',
    ),
}


@pytest.mark.parametrize("key", REFUSALS)
def test_a_run_that_asks_for_more_is_refused_before_data_are_opened(
    config: Config, tmp_path: Path, key: str
) -> None:
    """All its messages are, by a reason that names the key; with less, data are."""
    model = str(config["model.name"])
    refused, told, allowed = (text.replace("{model}", model) for text in REFUSALS[key])
    node = policed(tmp_path, refused, config)
    reasons = {ask(kind, node).error.reason for kind in KINDS}
    assert reasons == {f"it refuses: {key} of its policy: {told}"}
    assert NOWHERE not in str(reasons)
    assert [line["event"] for line in log_of(tmp_path)] == ["asked", "refused"] * 5

    node = policed(tmp_path, allowed, config)
    assert ask("query", node).error.reason == MASKED
    assert log_of(tmp_path)[-1]["event"] == "failed"


def test_each_key_has_its_test() -> None:
    """Here; `state` is in that of the ledger, as are the seconds of all runs."""
    known = {key.name for key in list_policy_keys()}
    known -= {"state", "most.seconds", "most.delta"}  # see test_ledger
    known -= {"fewest.examples", "most.message-seconds", "most.gigabytes"}  # below
    known -= {"key"}  # see test_peers
    tables = {"ranges.train.epochs", "allowed.upload.dtype"}
    assert known | tables == {*REFUSALS}


# Models


def test_a_model_is_known_by_its_weights(config: Config, tmp_path: Path) -> None:
    node = policed(tmp_path, f'models = ["{NEVER}"]', config)
    reply = ask("query", node)
    said, _, digest = str(reply.error.reason).partition("digest is ")
    assert said == "it refuses: models of its policy: the weights' "
    assert digest.endswith(f"; allowed: {NEVER}")
    for kind in KINDS:
        assert ask(kind, node).error.reason == reply.error.reason
    node = policed(tmp_path, f'models = ["{digest[:32]}"]', config)
    assert ask("query", node).error.reason == MASKED


def test_the_weights_of_a_model_are_not_read_where_the_node_may_not(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLORA_ASSETS")
    node = policed(tmp_path, f'models = ["{NEVER}"]', config)
    assert ask("query", node).error.reason == MASKED


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("org/model", True),
        ("org/other", True),
        ("organ/model", False),
        ("org/../evil/model", False),
        ("./org/model", True),
        (NEVER, False),
    ],
)
def test_patterns_of_models_lead_nowhere_else(name: str, is_known: bool) -> None:
    """Nor is a model allowed that has a digest for its name."""
    policy = parse_policy({"models": ["org/*", NEVER]})
    assert policy.names_model(name) == is_known


# Columns, ranges


def test_columns_of_a_data_set_are_those_that_the_run_reads(
    config: Config, tmp_path: Path
) -> None:
    config |= {"data.name": "stdlib-docs", "clients.count": 9, "clients.holdout": 0.0}
    policy = 'columns = ["text", "label"]'
    reply = ask("query", policed(tmp_path, policy, config))
    told = "columns of its policy: the run reads chapter; allowed: text, label"
    assert reply.error.reason == f"it refuses: {told}"


def test_a_range_holds_for_each_phases_training(config: Config, tmp_path: Path) -> None:
    """A phase's own key is no way around that of all."""
    policy = 'ranges."train.epochs" = {most = 2}'
    config |= {"method": "slora", "lora.epochs": 3}
    reply = ask("query", policed(tmp_path, policy, config))
    told = "ranges.train.epochs of its policy: it is 3; allowed: up to 2"
    assert reply.error.reason == f"it refuses: {told}"
    config |= {"lora.epochs": 2}
    assert ask("query", policed(tmp_path, policy, config)).error.reason == MASKED


def test_the_heads_rate_is_no_way_around_a_range_of_rates(
    config: Config, tmp_path: Path
) -> None:
    policy = 'ranges."train.lr" = {most = 0.02}'
    config |= {"method": "lora", "lora.lr": 0.01, "train.head-lr": 0.03}
    reply = ask("query", policed(tmp_path, policy, config))
    told = "ranges.train.lr of its policy: it is 0.03; allowed: up to 0.02"
    assert reply.error.reason == f"it refuses: {told}"


def test_no_boolean_is_a_number(config: Config, tmp_path: Path) -> None:
    node = policed(tmp_path, 'allowed."upload.feedback" = [1]', config)
    told = "allowed.upload.feedback of its policy: it is True; allowed: 1"
    assert ask("query", node).error.reason == f"it refuses: {told}"


# Examples


def instruct(config: Config) -> RecordDict:
    return first_instruction(config, LABELS).content()


def test_a_node_of_few_examples_does_not_tell_how_many(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    """Of forty, five are held out: a fifth, in whole fives."""
    told = "fewest.examples of its policy: a client here has fewer; allowed: at least "
    for least, kind in ((41, "query"), (36, "train"), (36, "evaluate")):
        policy = f"fewest.examples = {least}"
        node = policed(tmp_path, policy, config, data_path=str(notes))
        reply = ask(kind, node, None if kind == "query" else instruct(config))
        assert reply.error.reason == f"it refuses: {told}{least}"
    policy = "fewest.examples = 41"
    node = policed(tmp_path, policy, config, data_path=str(notes), min_examples=42)
    assert ask("query", node).error.reason == MASKED
    for least, kind in ((40, "query"), (35, "train")):
        policy = f"fewest.examples = {least}"
        node = policed(tmp_path, policy, config, data_path=str(notes))
        assert not ask(
            kind, node, None if kind == "query" else instruct(config)
        ).has_error()


def test_clients_of_shared_data_need_as_many(config: Config, tmp_path: Path) -> None:
    """Of ten rows, two clients have five each."""
    rows = own_data.texts(0, 10, LABELS)
    data = own_data.write(tmp_path / "data.csv", rows)
    config |= {"data.name": str(data), "data.test": str(data), "clients.count": 2}
    config |= {"clients.per-round": 1, "clients.holdout": 0.0}
    config |= {"clients.partitioner": "iid"}
    told = "fewest.examples of its policy: a client here has fewer; allowed: at least 6"
    for least, is_refused in ((6, True), (5, False)):
        path = tmp_path / "policy.toml"
        path.write_text(f"fewest.examples = {least}")
        node = a_node(config, policy=str(path), allowed_folders=str(tmp_path))
        reply = ask("train", node, first_instruction(config, []).content())
        assert reply.has_error() == is_refused
        assert not is_refused or reply.error.reason == f"it refuses: {told}"


# Members


@pytest.fixture
def secret(config: Config) -> Config:
    return config | SECURE | {"clients.holdout": 0.0, "data.test": "test.csv"}


def test_members_are_counted_in_each_message_of_a_round(
    secret: Config, tmp_path: Path
) -> None:
    state = Array("float32", (0,), "numpy.ndarray", b"")
    letters = {1: b"sealed"}
    asked = {
        "query.introduce": Introduction(5, 1, 1, 0, b"own", {1: b"keys"}).content(),
        "train": Instruction(1, 0, [0], "", state, letters=letters).content(),
        # A member that is named twice is one.
        "query.tell": Question(1, 1, [0, 1, 1], [2, 3]).content(),
    }
    words = {
        "query.introduce": "are introduced",
        "train": "train",
        "query.tell": "are in the sum",
    }
    for kind, content in asked.items():
        node = policed(tmp_path, "fewest.members = 3", secret)
        told = f"2 nodes {words[kind]}; allowed: at least 3"
        reason = f"it refuses: fewest.members of its policy: {told}"
        assert ask(kind, node, content).error.reason == reason
        node = policed(tmp_path, "fewest.members = 2", secret)
        assert "of its policy" not in str(ask(kind, node, content).error.reason)


# What is used


def test_what_a_run_uses_is_counted(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    node = policed(tmp_path, "", config, data_path=str(notes))
    replies = [ask("query", node), ask("train", node, instruct(config))]
    replies.append(ask("evaluate", node, instruct(config)))
    [used] = Ledger(tmp_path / "state", Most()).runs().values()
    assert used.bytes == sum(map(message_bytes, replies))
    assert used.seconds > 0
    assert used.reserved == {}
    lines = log_of(tmp_path)
    assert [line["event"] for line in lines] == ["asked", "answered"] * 3
    assert [line["sha256"] for line in lines[1::2]] == [
        reply.content.object_id for reply in replies
    ]
    assert [line.get("server-round") for line in lines[::2]] == [None, 1, 1]


def test_a_reply_that_is_too_large_does_not_leave(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    """Its bytes are counted before it is sent."""
    size = message_bytes(ask("query", a_node(config, **columns(notes))))
    for most, is_refused in ((size - 1, True), (size, False)):
        policy = f'most.bytes = {most}\nstate = "of-{most}"'
        node = policed(tmp_path, policy, config, data_path=str(notes))
        reply = ask("query", node)
        assert reply.has_error() == is_refused
    assert ask("query", node).error.reason == (
        "it refuses: most.bytes of its policy: too little is left of what all runs "
        f"together may use; allowed: {size} in all"
    )


def columns(notes: Path) -> dict[str, str]:
    return {"data_path": str(notes), "data_text": "text", "data_label": "label"}


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_message_ends_when_its_seconds_have_passed(
    config: Config, tmp_path: Path, notes: Path, kind: str
) -> None:
    policy = "most.message-seconds = 1e-9"
    node = policed(tmp_path, policy, config, data_path=str(notes))
    told = "most.message-seconds of its policy: this message would take longer"
    reply = ask(kind, node, instruct(config))
    assert reply.error.reason == f"it refuses: {told}; allowed: 1e-09"


def test_a_message_ends_when_all_runs_have_had_their_seconds(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    policy = "most.seconds = 1e-9"
    node = policed(tmp_path, policy, config, data_path=str(notes))
    told = "most.seconds of its policy: this message would take longer; allowed: 1e-09 "
    told += "in all"
    reply = ask("train", node, instruct(config))
    assert reply.error.reason == f"it refuses: {told}"
    told = "most.seconds of its policy: too little is left of what all runs together "
    told += "may use; allowed: 1e-09 in all"
    node = policed(tmp_path, policy, config)
    for kind in KINDS:
        assert ask(kind, node).error.reason == f"it refuses: {told}"


def test_all_runs_together_spend_no_more_of_examples_privacy(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    """Each run's training is one step, on all of the node's forty examples."""
    config |= {"privacy.unit": "example", "privacy.noise-multiplier": 4.0}
    config |= {"privacy.clip-norm": 1.0, "clients.holdout": 0.0}
    config |= {"data.test": "/test.csv", "data.labels": ",".join(LABELS)}
    config |= {"train.batch-size": 40, "privacy.delta": 1e-3}
    one, two = (by_hand(4.0, steps, 1e-6) for steps in (1, 2))
    policy = f"most = {{epsilon = {(one + two) / 2}, delta = 1e-6}}"
    told = "too little is left of what all runs together may use; allowed: "
    for run, is_refused in ((5, False), (6, True), (7, True)):
        node = policed(tmp_path, policy, config, data_path=str(notes))
        node.run_id = run
        reply = ask("train", node, instruct(config))
        assert reply.has_error() == is_refused
        make_process.cache_clear()
    reason = str(reply.error.reason)
    assert reason.startswith(f"it refuses: most.epsilon of its policy: {told}")
    runs = Ledger(tmp_path / "state", Most()).runs()
    assert {run: used.releases for run, used in runs.items() if used.releases} == {
        "5": [Release(1.0, 4.0, 1)]
    }
    # Of the others nothing was sent, but time has passed.
    assert [used.bytes for used in runs.values()][1:] == [0, 0]


def test_the_cache_is_as_small_as_the_policy_says(
    config: Config, tmp_path: Path
) -> None:
    kept = cache_folder() / "old"
    for gigabytes, is_kept in ((1e-6, True), (9e-7, False)):
        kept.write_bytes(bytes(1000))
        ask("query", policed(tmp_path, f"most.gigabytes = {gigabytes}", config))
        assert kept.exists() == is_kept


# Policies


@pytest.mark.parametrize("policy", ["metods = []", "methods = 'fft'", "[most", "\0"])
def test_a_broken_policy_refuses_all_and_tells_no_path(
    config: Config, tmp_path: Path, policy: str
) -> None:
    node = policed(tmp_path, policy, config)
    told = "it refuses: its policy or log is of no use; its own log says why"
    assert {ask(kind, node).error.reason for kind in KINDS} == {told}
    (tmp_path / "policy.toml").unlink()
    assert ask("query", node).error.reason == told


def test_the_environment_names_a_policy_too(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.toml"
    path.write_text('methods = ["lora"]')
    monkeypatch.setenv("SLORA_POLICY", str(path))
    reason = "it refuses: methods of its policy: method is 'fft'; allowed: lora"
    assert ask("query", a_node(config, data_path=NOWHERE)).error.reason == reason
    node = policed(tmp_path, "", config)
    assert ask("query", node).error.reason == MASKED
    shared = SharedContext(5, 7, {}, RecordDict(), config)
    assert "policy" not in str(ask("query", shared).error.reason)


def test_a_run_that_ends_is_deleted_whatever_it_asked_for(
    config: Config, tmp_path: Path
) -> None:
    node = policed(tmp_path, 'methods = ["lora"]', config)
    assert not ask("query.end", node, write_lineage(3)).has_error()
    assert [line["event"] for line in log_of(tmp_path)] == ["asked", "answered"]


def test_without_a_policy_nothing_is_kept_or_told(
    config: Config, tmp_path: Path, notes: Path
) -> None:
    plain = ask("query", a_node(config, **columns(notes)))
    before = {*tmp_path.iterdir()}
    make_process.cache_clear()
    policy = policed(tmp_path, "", config, **columns(notes))
    assert told(ask("query", policy)) == told(plain)
    added = {*tmp_path.iterdir()} - before
    assert added == {tmp_path / "policy.toml", tmp_path / "state"}


def told(reply: Message) -> bytes:
    content = message_to_proto(reply).content
    return content.SerializeToString(deterministic=True)


@pytest.mark.parametrize("table", ["ranges", "allowed"])
def test_ranges_are_those_of_known_keys(table: str) -> None:
    for key in list_keys():
        given = {"allowed": [key.default], "ranges": {"most": 1}}[table]
        if table == "allowed" or key.type in ("integer", "float"):
            parse_policy({table: {key.name: given}})
