"""Run configs and servers that try to make a node give its data away."""

from pathlib import Path

import pytest
from flwr.app import Array, Context, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto

from slora_flwr.client.process import SharedContext, get_process, make_process
from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.node_files import OwnData, OwnDataError
from slora_flwr.wire.messages import Instruction
from tests.support.causal import save_language_model
from tests.support.own_data import KINDS, as_dialogues, columns_of, texts, write
from tests.support.own_node import MASKED, a_node, ask, first_instruction, make_config
from tests.support.runs import Config

SECRET = "s3cret"


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def config(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("SLORA_ASSETS", str(tiny_models["bert"]))
    return make_config(tiny_models["bert"])


def told(reply: Message) -> bytes:
    return message_to_proto(reply).SerializeToString()


def instruct(*classes: str) -> Instruction:
    state = Array("float32", (0,), "numpy.ndarray", b"")
    return Instruction(1, 0, [0], "", state, classes=list(classes))


# What the server learns of a node's data


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A file in which two columns must not leave the node."""
    path = tmp_path / "records.jsonl"
    rows = texts(0, 40, KINDS)
    lines = [
        f'{{"text": "{text}", "label": "{label}", "patient": "{SECRET}-{i // 2}"}}\n'
        for i, (text, label) in enumerate(rows)
    ]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("column", ["patient", "text"])
def test_a_run_cannot_choose_what_is_told_as_labels(
    config: Config, records: Path, column: str
) -> None:
    config["data.label"] = column
    bare = a_node(config, data_path=str(records))
    reply = ask("query", bare)
    assert reply.error.reason == MASKED
    answer = ask("query", a_node(config, **columns(records))).content
    assert answer.config_records["config"]["labels"] == KINDS


def columns(path: Path) -> dict[str, str]:
    return {key.replace("-", "_"): value for key, value in columns_of(path).items()}


@pytest.mark.parametrize("missing", ["data-text", "data-label"])
def test_a_nodes_config_must_name_its_columns(
    config: Config, records: Path, missing: str
) -> None:
    given = columns_of(records)
    del given[missing]
    context = a_node(config)
    context.node_config |= given
    assert ask("query", context).error.reason == MASKED


def test_a_column_that_is_nearly_unique_is_not_told(
    config: Config, records: Path
) -> None:
    context = a_node(config, **columns(records) | {"data_label": "patient"})
    reply = ask("query", context)
    assert reply.error.reason == MASKED
    assert SECRET.encode() not in told(reply)


def test_a_clients_only_value_is_not_told(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "one.csv", [("w1 w2", SECRET)] * 40)
    reply = ask("query", a_node(config, **columns(path)))
    assert reply.error.reason == MASKED
    listed = a_node(config, **columns(path), data_labels=SECRET)
    assert not ask("query", listed).has_error()


def test_a_rare_label_is_not_told(config: Config, tmp_path: Path) -> None:
    rows = [*texts(0, 40, KINDS), *[("w1 w2", SECRET)] * 4]
    path = write(tmp_path / "a.csv", rows)
    reply = ask("query", a_node(config, **columns(path)))
    assert SECRET.encode() not in told(reply)
    described = reply.content.config_records["config"]
    assert described["skipped"] == ["rare label"]
    assert reply.content.metric_records["metrics"]["skipped"] == [4]
    with pytest.raises(OwnDataError, match="min-examples is 10"):
        get_process(a_node(config, **columns(path)), instruct(SECRET, "zzz"))


def test_labels_that_a_node_does_not_list_are_not_told(
    config: Config, tmp_path: Path
) -> None:
    rows = [*texts(0, 40, KINDS), *[("w1 w2", SECRET)] * 9]
    path = write(tmp_path / "a.csv", rows)
    node = a_node(config, **columns(path), data_labels=", ".join(KINDS))
    reply = ask("query", node)
    assert SECRET.encode() not in told(reply)
    assert reply.content.config_records["config"]["skipped"] == ["other label"]


def test_a_node_trains_on_no_fewer_examples_than_it_says(
    config: Config, tmp_path: Path
) -> None:
    """Neither by the classes nor by the share that is held out."""
    rows = [("w1 w2", "a")] * 9 + [("w3 w4", "b")] * 30
    path = write(tmp_path / "a.csv", rows)

    def node() -> Context:
        return a_node(config, **columns(path), min_of_label=1)

    get_process(node(), instruct("a", "b"))
    with pytest.raises(OwnDataError, match="7 examples are left"):
        get_process(node(), instruct("a", "zzz"))
    config["clients.holdout"] = 0.9
    with pytest.raises(OwnDataError, match="4 examples are left"):
        get_process(node(), instruct("a", "b"))


def test_a_node_takes_no_steps_on_fewer_examples_than_it_says(
    config: Config, tmp_path: Path
) -> None:
    """24 examples make batches of 8 or, of up to 10, three of 8 too."""
    rows = [("w1 w2", "a"), ("w3 w4", "b")] * 12
    path = write(tmp_path / "a.csv", rows)
    config |= {"clients.holdout": 0.0, "data.test": "test.csv"}
    for batch, steps, read in (
        (1, 9, 9),
        (8, 1, 8),
        (10, 1, 8),
        (9, 0, 24),
        (8, 2, 16),
    ):
        config |= {"train.batch-size": batch, "train.steps": steps}
        node = a_node(config, **columns(path))
        if read < 10:
            with pytest.raises(OwnDataError, match=f"{read} examples are left"):
                get_process(node, instruct("a", "b"))
        else:
            get_process(node, instruct("a", "b"))


def test_a_node_evaluates_on_no_single_example(config: Config, tmp_path: Path) -> None:
    rows = [("w1 w2", "a"), ("w3 w4", "b")] * 25
    node = a_node(config, **columns(write(tmp_path / "a.csv", rows)))
    for share in (0.0, 0.1):
        node.run_config["clients.holdout"] = share
        node.run_config["data.test"] = "test.csv"
        get_process(node, instruct("a", "b"))
    node.run_config["clients.holdout"] = 0.02
    with pytest.raises(OwnDataError, match="1 example is held out"):
        get_process(node, instruct("a", "b"))
    node.run_config |= {"clients.holdout": 0.2, "clients.max-weight": 1}
    with pytest.raises(OwnDataError, match="1 example is held out"):
        get_process(node, instruct("a", "b"))
    for most, evaluated in ((0, 10), (9, 5), (8, 5), (5, 5)):
        node.run_config["clients.max-weight"] = most
        data = get_process(node, instruct("a", "b")).trainer.data
        assert [len(part) for part in data.examples(0)] == [40, evaluated]


def test_few_examples_are_not_described(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("w1 w2", "a"), ("w3 w4", "b")] * 12)
    assert not ask("query", a_node(config, **columns(path))).has_error()
    strict = a_node(config, **columns(path), min_examples=25)
    assert ask("query", strict).error.reason == MASKED
    with pytest.raises(OwnDataError, match="24 examples are left"):
        OwnData(str(path), "text", "label", min_examples=25).usable()


# What a node opens


def test_a_node_with_data_of_its_own_trains_on_nothing_else(
    config: Config, records: Path, corpus: Path
) -> None:
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = str(corpus)
    folders = {"allowed_folders": str(corpus.parent)}
    assert not ask("query", a_node(config, **folders)).has_error()
    reply = ask("query", a_node(config, **columns(records), **folders))
    assert reply.error.reason == MASKED


@pytest.mark.parametrize("key", ["data.name", "data.train", "data.test", "model.name"])
def test_a_node_opens_no_path_that_its_config_does_not_allow(
    config: Config, tmp_path: Path, key: str
) -> None:
    """It answers alike whether there is such a file, and what is in it."""
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = "stdlib-docs" if key == "model.name" else "somebody/some"
    secret = write(tmp_path / "data.csv", [("w1", SECRET), ("w2", SECRET)] * 20)
    replies = set()
    for path in (secret, tmp_path / "none.csv", tmp_path, "../../etc/data.csv", "~"):
        reply = ask("query", a_node(config | {key: str(path)}))
        replies.add(reply.error.reason)
        assert SECRET.encode() not in told(reply)
    assert replies == {MASKED}


def test_a_file_that_happens_to_have_a_name_is_not_opened(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.csv", texts(0, 40, KINDS))
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = "data.csv"
    assert ask("query", a_node(config)).error.reason == MASKED
    allowed = a_node(config, allowed_folders=str(tmp_path))
    assert not ask("query", allowed).has_error()


def test_a_link_leads_out_of_no_folder(config: Config, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    secret = write(tmp_path / "data.csv", texts(0, 40, KINDS))
    (tmp_path / "open" / "link.csv").symlink_to(secret)
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = str(tmp_path / "open" / "link.csv")
    node = a_node(config, allowed_folders=str(tmp_path / "open"))
    assert ask("query", node).error.reason == MASKED


@pytest.mark.parametrize(
    ("data", "is_below_assets"),
    [
        ({"data.train": "link.csv"}, False),
        ({"data.train": "link"}, False),
        ({"data.train": "train.csv", "data.test": "link.csv"}, False),
        ({"data.train": "linked/data.csv"}, False),
        ({"data.name": "linked", "data.train": "data.csv"}, True),
    ],
)
def test_a_link_inside_an_allowed_folder_leads_out_of_none(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: Config,
    is_below_assets: bool,
) -> None:
    """Unless the folder to which it leads is allowed too."""
    place, hidden = tmp_path / "assets" / "data", tmp_path / "hidden"
    place.mkdir(parents=True)
    hidden.mkdir()
    secret = write(hidden / "data.csv", texts(0, 40, KINDS))
    write(place / "train.csv", texts(0, 40, KINDS))
    for name, target in (("link.csv", secret), ("linked", hidden)):
        (place / name).symlink_to(target)
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config |= {"data.name": str(place)} | data
    model = str(config["model.name"])
    if is_below_assets:
        monkeypatch.setenv("SLORA_ASSETS", str(tmp_path / "assets"))
    allowed = ",".join([str(place), model])
    reply = ask("query", a_node(config, allowed_folders=allowed))
    assert reply.error.reason == MASKED
    make_process.cache_clear()
    reply = ask("query", a_node(config, allowed_folders=f"{allowed},{hidden}"))
    assert not reply.has_error()


def test_a_simulated_node_follows_links(config: Config, tmp_path: Path) -> None:
    secret = write(tmp_path / "data.csv", texts(0, 40, KINDS))
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link.csv").symlink_to(secret)
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config |= {"data.name": str(tmp_path / "open"), "data.train": "link.csv"}
    assert not ask("query", SharedContext(5, 7, {}, RecordDict(), config)).has_error()


def test_empty_assets_are_no_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the data folder of the directory in which the node was started."""
    (tmp_path / "data" / "hidden").mkdir(parents=True)
    write(tmp_path / "data" / "hidden" / "train.csv", texts(0, 40, KINDS))
    model = str(config["model.name"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLORA_ASSETS", "")
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = "hidden"
    reply = ask("query", a_node(config, allowed_folders=model))
    assert reply.error.reason == MASKED
    with pytest.raises(ConfigError, match=r"data\.name is 'hidden'"):
        load_texts(DataConfig(name="hidden"))


def test_a_simulated_nodes_path_is_no_nodes(config: Config, tmp_path: Path) -> None:
    """Whatever a node's operator sets, as in Flower's examples."""
    write(tmp_path / "0.csv", texts(0, 40, KINDS))
    config["data.train"] = f"{tmp_path}/{{}}.csv"
    node = a_node(config, partition_id=0, num_partitions=2)
    assert ask("query", node).error.reason == MASKED


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_an_instruction_without_classes_opens_nothing(
    config: Config, records: Path, tmp_path: Path, kind: str
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(f'{{"{SECRET}": 1}}\n')
    config |= {"data.test": str(test)}
    reply = ask(kind, a_node(config, **columns(records)), instruct().content())
    assert reply.error.reason == MASKED


# Language models, which have no labels


@pytest.fixture
def dialogues(config: Config, tmp_path: Path) -> Config:
    """The config of a run that is evaluated on what nodes hold out."""
    model = save_language_model("llama", tmp_path / "llama")
    return as_dialogues(config | {"model.name": str(model)}, model)


def responses(path: Path) -> dict[str, str]:
    given = columns_of(path, "causal-lm")
    return {key.replace("-", "_"): value for key, value in given.items()}


def test_nothing_of_labels_leaves_a_node_for_a_language_model(
    dialogues: Config, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(dialogues["model.name"]))
    reply = ask("query", a_node(dialogues, **responses(records)))
    assert not any(kind.encode() in told(reply) for kind in KINDS)
    assert "labels" not in reply.content.config_records["config"]
    assert reply.content.metric_records["metrics"] == {"examples": [40]}


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_node_refuses_a_server_that_asks_a_language_model_for_classes(
    dialogues: Config, records: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of the examples of one label or another would tell them apart."""
    monkeypatch.setenv("SLORA_ASSETS", str(dialogues["model.name"]))
    for classes in ([], KINDS[:2]):
        content = first_instruction(dialogues, classes).content()
        reply = ask(kind, a_node(dialogues, **responses(records)), content)
        assert reply.has_error() == bool(classes)
    assert reply.error.reason == MASKED


@pytest.mark.parametrize(
    "columns",
    [
        {"data_text": "text", "data_label": "label"},
        {"data_response": "label"},
        {"data_text": "text", "data_response": "nothing"},
        {"data_messages": "text"},
    ],
)
def test_a_node_has_a_language_model_learn_what_its_config_names_for_it(
    dialogues: Config,
    records: Path,
    columns: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts that its operator has told apart by labels are not learned by heart."""
    monkeypatch.setenv("SLORA_ASSETS", str(dialogues["model.name"]))
    reply = ask("query", a_node(dialogues, data_path=str(records), **columns))
    assert reply.error.reason == MASKED


def test_limits_hold_for_language_models(
    dialogues: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(dialogues["model.name"]))
    path = write(tmp_path / "a.csv", texts(0, 24, KINDS))
    assert not ask("query", a_node(dialogues, **responses(path))).has_error()
    strict = a_node(dialogues, **responses(path), min_examples=25)
    assert ask("query", strict).error.reason == MASKED
    for share, is_good in ((0.3, True), (0.9, False), (0.05, False)):
        node = a_node(dialogues | {"clients.holdout": share}, **responses(path))
        content = first_instruction(dialogues, []).content()
        assert ask(MessageType.EVALUATE, node, content).has_error() != is_good
        make_process.cache_clear()


# Errors


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text,label\n",
        f"text,{SECRET}\na,b\n".encode(),
        b'text,label\n"' + SECRET.encode(),
        b"\xff\xfe" + SECRET.encode("utf-16"),
        f"text,label\n{SECRET},{SECRET},{SECRET}\n".encode(),
    ],
)
def test_errors_of_data_are_alike(
    config: Config, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / f"{SECRET}.csv"
    path.write_bytes(content)
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = str(path)
    shared = ask("query", a_node(config, allowed_folders=str(tmp_path)))
    config |= {"clients.count": 0, "data.name": "node", "clients.holdout": 0.2}
    own = ask("query", a_node(config, **columns(path)))
    assert (shared.error.reason, own.error.reason) == (MASKED, MASKED)


def test_labels_that_are_only_compared_are_not_sent(
    config: Config, tmp_path: Path
) -> None:
    rows = [(text, SECRET + label) for text, label in texts(0, 40, KINDS)]
    path = write(tmp_path / "a.csv", rows)
    config |= {"clients.count": 2, "clients.per-round": 1, "clients.holdout": 0.0}
    config["data.name"] = str(path)
    reply = ask("query", a_node(config, allowed_folders=str(tmp_path)))
    assert not reply.has_error()
    assert SECRET.encode() not in told(reply)
