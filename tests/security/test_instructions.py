"""Instructions by which a server would read a node's data, or keep it busy."""

import json
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, Context, Message, MessageType, RecordDict

from slora_flwr.backbone.load import load_tokenizer
from slora_flwr.client import handlers, resident
from slora_flwr.client.errors import MismatchError
from slora_flwr.client.permits import masked
from slora_flwr.client.process import SharedContext, get_process, make_process
from slora_flwr.config import ConfigError, parse
from slora_flwr.data.node_files import LONGEST_LABEL, MOST_LABELS, OwnDataError
from slora_flwr.training.process_data import held_out
from slora_flwr.wire.messages import BaseDelta, Instruction, MessageError
from slora_flwr.wire.packing import PayloadError
from slora_flwr.wire.state_channel import name_version
from tests.support.own_data import KINDS, columns_of, texts, write
from tests.support.own_node import (
    MASKED,
    a_node,
    ask,
    first_instruction,
    make_config,
)
from tests.support.runs import Config

TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE
ROWS = texts(0, 40, KINDS)
ESCAPES = "\x1b[2J\nnode 1 left "


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def config(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("SLORA_ASSETS", str(tiny_models["bert"].parent))
    return make_config(tiny_models["bert"])


@pytest.fixture
def node(config: Config, tmp_path: Path) -> Callable[..., Context]:
    """Make the node of a new run, with 40 rows of its own."""
    path = write(tmp_path / "rows.csv", ROWS)

    def made(**run_config: Any) -> Context:
        named = {name.replace("_", "."): value for name, value in run_config.items()}
        context = a_node(config | named)
        context.node_config |= columns_of(path)
        return context

    return made


@pytest.fixture
def instruction(config: Config) -> Instruction:
    return first_instruction(config, KINDS)


def figures(reply: Message) -> dict[str, Any]:
    return dict(reply.content.metric_records["metrics"])


def instruct(*classes: str, client: int = 0) -> Instruction:
    state = Array("float32", (0,), "numpy.ndarray", b"")
    return Instruction(1, 0, [client], "0" * 32, state, classes=list(classes or KINDS))


# Which examples an instruction is about


def test_what_is_held_out_depends_on_nothing_but_the_texts(
    node: Callable[..., Context],
) -> None:
    order = sorted(
        ROWS, key=lambda row: blake2b(row[0].encode(), digest_size=16).digest()
    )
    for client, seed in ((0, 1), (7, 1), (0, 2)):
        context = node(seed=seed, clients_holdout=0.25, data_label="text")
        data = get_process(context, instruct(client=client)).trainer.data
        train, held = data.examples(client)
        given = [KINDS[label] for label in (*train.labels, *held.labels)]
        assert given == [label for _, label in order]
        assert len(held) == 10


def test_texts_that_are_alike_are_held_out_from_the_last(
    config: Config, tmp_path: Path
) -> None:
    rows = [("w5 w6", kind) for kind in ("a", "b")] * 20
    context = a_node(config)
    context.node_config |= columns_of(write(tmp_path / "a.csv", rows))
    data = get_process(context, instruct("a", "b")).trainer.data
    assert data.examples(0)[1].labels.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_node_is_one_client_in_a_run(
    node: Callable[..., Context], instruction: Instruction, kind: str
) -> None:
    context = node()
    instruction.clients = [0, 1]
    assert ask(kind, context, instruction.content()).error.reason == MASKED
    for client, may in ((0, True), (1, False), (0, True)):
        instruction.clients = [client]
        reply = ask(kind, context, instruction.content())
        assert reply.has_error() != may
        if not may:
            assert reply.error.reason == MASKED
        make_process.cache_clear()  # as where each message has its own process


def test_ids_of_clients_do_not_fill_the_memory(
    node: Callable[..., Context], instruction: Instruction
) -> None:
    """Flower drops what an instruction pinned if the node then raises an exception."""
    instruction.fingerprint = "0" * 32
    for client in range(5):
        instruction.clients = [client]
        with pytest.raises(MismatchError):
            ask(EVALUATE, node(), instruction.content())
    assert len(get_process(node(), instruction).trainer.data._own) == 1


def test_simulated_nodes_of_one_process_hold_out_what_nodes_do(
    config: Config, tmp_path: Path
) -> None:
    for number in (0, 1):
        write(tmp_path / f"{number}.csv", texts(number, 40, KINDS))
    config["clients.holdout"] = 0.25
    simulated = config | {"data.train": f"{tmp_path}/{{}}.csv"}
    found: list[list[Any]] = [[], []]
    contexts = [
        SharedContext(
            5,
            number,
            {"partition-id": number, "num-partitions": 2},
            RecordDict(),
            {**simulated},
        )
        for number in (0, 1)
    ]
    for number in (0, 1, 0, 1):
        asked = instruct(client=number)
        own = a_node(config)
        own.node_config |= columns_of(tmp_path / f"{number}.csv")
        for context in (contexts[number], own):
            data = get_process(context, asked).trainer.data
            both = [part.labels.tolist() for part in data.examples(number)]
            found[context is own].append(both)
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    with pytest.raises(OwnDataError, match="client differ"):
        get_process(contexts[0], instruct(client=1))


def test_shares_do_not_hold_out_single_examples_more(
    node: Callable[..., Context], instruction: Instruction
) -> None:
    for share, held in ((0.2, 5), (0.225, 5), (0.25, 10), (0.0, 0)):
        test = {"data_test": "test.csv"} if not share else {}
        reply = ask(
            EVALUATE, node(clients_holdout=share, **test), instruction.content()
        )
        assert figures(reply)["num-examples"] == held <= held_out(40, share)
        reply = ask(TRAIN, node(clients_holdout=share, **test), instruction.content())
        assert figures(reply)["examples"] == [40 - held]
    with pytest.raises(OwnDataError, match="2 examples are held out"):
        get_process(node(clients_holdout=0.05), instruction)


def test_the_classes_are_those_of_a_runs_first_instruction(
    config: Config, tmp_path: Path
) -> None:
    rows = [("w5 w6", "a")] * 20 + [("w7 w8", "b")] * 20 + [("w9 w10", "c")] * 5
    context = a_node(config)
    context.node_config |= columns_of(write(tmp_path / "a.csv", rows))
    config["clients.holdout"] = 0.25
    for classes, may in (("ab", True), ("abc", False), ("ba", False), ("ab", True)):
        asked = first_instruction(config, [*classes])
        make_process.cache_clear()
        reply = ask(TRAIN, context, asked.content())
        assert reply.has_error() != may
        if not may:
            assert reply.error.reason == MASKED


@pytest.mark.parametrize(
    "classes",
    [
        [f"class {i}" for i in range(MOST_LABELS + 1)],
        ["a", "b" * (LONGEST_LABEL + 1)],
        [1, 2],
    ],
)
def test_classes_are_bounded(classes: list[Any]) -> None:
    content = instruct().content()
    content.config_records["config"]["classes"] = classes
    with pytest.raises(MessageError, match="class") as caught:
        Instruction.read(content)
    assert len(str(caught.value)) < 500


def test_a_client_is_named_once() -> None:
    asked = instruct()
    asked.clients = [3, 0, 3]
    with pytest.raises(MessageError, match="a client is named twice"):
        Instruction.read(asked.content())


# Work without end


@pytest.mark.parametrize(
    ("phase", "server_round", "phase_round"),
    [(2, 2, 1), (1, 2**63, 1), (1, 4, 1), (1, 2, 3)],
)
@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_rounds_that_a_run_does_not_have_are_refused(
    node: Callable[..., Context],
    kind: str,
    phase: int,
    server_round: int,
    phase_round: int,
) -> None:
    """Before as many masks are drawn as there would have been rounds."""
    sparse = {"sparse_rounds": 1, "sparse_schedule": "per-round", "rounds": 3}
    context = node(method="slora", **sparse)
    junk = b"x" * 100
    asked = instruct()
    asked.phase, asked.server_round, asked.phase_round = (
        phase,
        server_round,
        phase_round,
    )
    asked.base = name_version(junk)
    packed = Array("float32", (25,), "slora.packed", junk)
    asked.base_delta = BaseDelta(known=asked.base, start=packed)
    content = asked.content()
    # Larger numbers travel as text.
    content.config_records["config"]["server-round"] = str(server_round)
    with pytest.raises(MismatchError, match="allowed: phases from 0 to 1, and rounds"):
        ask(kind, context, content)


def test_a_base_that_is_none_is_not_kept(
    node: Callable[..., Context], tmp_path: Path
) -> None:
    context = node(method="slora", rounds=3, sparse_rounds=1)
    junk = b"x" * 1000
    asked = instruct()
    asked.phase, asked.server_round, asked.base = 1, 2, name_version(junk)
    packed = Array("float32", (250,), "slora.packed", junk)
    asked.base_delta = BaseDelta(known=asked.base, start=packed)
    with pytest.raises(PayloadError):
        ask(TRAIN, context, asked.content())
    kept = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [name for name in kept if name.startswith("base-")] == []


# Errors


@pytest.fixture
def panicking(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A model whose tokeniser panics at a text with `w64`, and at no other."""
    folder = tmp_path / "assets" / "panicking"
    shutil.copytree(tiny_models["bert"], folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "w64 ((z)+)+x"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def panic(model: Path) -> None:
    tokenizer = load_tokenizer(parse({"model.name": str(model)}).model)
    tokenizer([f"w64 {'z' * 42}"])


def test_a_panic_of_a_tokeniser_says_nothing_of_a_text(
    config: Config, panicking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(panicking.parent))
    with pytest.raises(BaseException, match="Onig") as caught:
        panic(panicking)
    assert not isinstance(caught.value, Exception)
    rows = [(f"{text} w64 {'z' * 42}", label) for text, label in ROWS]
    context = a_node(config | {"model.name": str(panicking)})
    context.node_config |= columns_of(write(tmp_path / "a.csv", rows))
    reply = ask(EVALUATE, context, instruct().content())
    assert reply.error.reason == MASKED


def test_a_panic_does_not_end_a_resident_worker_without_an_answer(
    config: Config, panicking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(panicking.parent))

    def query(message: Message, context: Context) -> Message:
        panic(panicking)
        return message

    monkeypatch.setitem(handlers.HANDLERS, "query", query)
    message = Message(RecordDict(), 7, "query")
    frames = resident._answer(message, a_node(config))
    assert frames[0] == b"pyo3_runtime:PanicException"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_who_ends_a_node_is_not_held_up(kind: type[BaseException]) -> None:
    with pytest.raises(kind), masked():
        raise kind


@pytest.mark.parametrize("given", [ESCAPES, "f" * 5_000_000, "f00d"])
def test_a_fingerprint_is_a_digest(given: str) -> None:
    content = instruct().content()
    content.config_records["config"]["fingerprint"] = given
    with pytest.raises(MessageError, match="is not a digest") as caught:
        Instruction.read(content)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("given", [ESCAPES, ESCAPES * 100_000])
@pytest.mark.parametrize(
    "key", ["", "method", "seed", "data.labels", "lora.ranks", "server.optimizer"]
)
def test_errors_of_a_run_config_are_short_lines(
    config: Config, key: str, given: str
) -> None:
    values = config | {"data.name": "stdlib-docs", "clients.holdout": 0.0}
    values |= {key or given: given}
    with pytest.raises(ConfigError, match=r"allowed|known") as caught:
        parse(values)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5000
