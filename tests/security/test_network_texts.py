"""Texts and figures from nodes: clean and short wherever they are shown."""

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from slora_flwr.common.text import clean_label
from slora_flwr.data.node_files import MOST_LABELS, OwnData
from slora_flwr.reports.page import Column, Page, Section, Table, render, write_csv
from slora_flwr.runs.events import Event, NodeJoined
from slora_flwr.server.own_data_fleet import Description, OwnDataFleet
from slora_flwr.server.round import MOST_WIRE_BYTES, Asked, read_report
from slora_flwr.studies.sweep import write_rows
from slora_flwr.wire.messages import MessageError, Report
from tests.support.own_data import HospitalGrid, gathered, hospital, write

ASKED = Asked(1, 0, "f", {7: {0: 1}}, 8)


def answer(**changes: Any) -> Message:
    report = Report(1, 0, "f")
    report.add(0, 1, 1.0, 1.0, 1)
    asked = Message(RecordDict(), dst_node_id=7, message_type="train")
    return Message(replace(report, **changes).content(), reply_to=asked)


pytestmark = pytest.mark.usefixtures("clock")


HIDDEN = {
    "colour": "flu\x1b[31m",
    "bell": "\aflu",
    "right-to-left": "flu\u202egnp",
    "zero-width": "fl\u200bu",
    "soft-hyphen": "fl\u00adu",
    "two-lines": "flu\nINFO: all is well",
    "trailing-blank": "flu ",
    "no-break": "flu\u00a0\u00a0two",
    "decomposed": "gru\u0308n",
}


@pytest.mark.parametrize("label", HIDDEN.values(), ids=HIDDEN)
def test_a_node_with_a_hidden_character_in_a_label_is_left_out(
    label: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = HospitalGrid({7: hospital("a", flu=3, ok=1), 8: hospital("b", **{label: 1})})
    found = gathered(grid)
    assert found.classes == ["flu", "ok"]
    assert "allowed: labels without" in found.left_out[8]
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize("label", HIDDEN.values(), ids=HIDDEN)
def test_an_honest_node_sends_clean_labels(label: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [("text", label), ("text", "ok")])
    source = OwnData(str(path), "text", "label")
    texts, skipped = source.load()
    assert texts.labels == [clean_label(label), "ok"]
    assert clean_label(texts.labels[0]) == texts.labels[0]
    assert not skipped


def test_labels_that_look_alike_are_one_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("a", "flu"), ("b", "flu "), ("c", "\u200bflu"), ("d", "flu\u2060")]
    path = write(tmp_path / "data.csv", rows)
    source = OwnData(str(path), "text", "label")
    assert source.load()[0].labels == ["flu"] * 4
    gathered(HospitalGrid({7: hospital("a", flu=3, ok=2), 8: hospital("b", Flu=1)}))
    assert "labels that look alike are different classes: Flu, flu" in caplog.text


def test_thousands_of_reasons_are_no_description() -> None:
    described: dict[str, Any] = {
        "name": "a",
        "labels": ["flu"],
        "skipped": [f"reason {i}" for i in range(20_000)],
    }
    with pytest.raises(ValueError, match="skips rows for 20000 reasons"):
        Description.read(described, {"examples": [1], "skipped": [1] * 20_000})


def test_counts_of_skipped_rows_are_bounded() -> None:
    described = {"name": "a", "labels": ["flu"], "skipped": ["broken"]}
    with pytest.raises(ValueError, match="description is off"):
        Description.read(described, {"examples": [1], "skipped": [2**62]})


def test_many_labels_make_short_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told: list[Event] = []
    long = {f"{i:03}{'x' * 190}": 1 for i in range(MOST_LABELS - 1)}
    grid = HospitalGrid({7: hospital("a", flu=3, ok=1), 8: hospital("b", ok=1, **long)})
    gathered(grid)
    own = OwnDataFleet({"protocol": 7}, 2, 5.0, labels=["flu", "ok"])
    own.gather(grid, told.append)
    assert all(len(record.getMessage()) < 1000 for record in caplog.records)
    joined = [event for event in told if isinstance(event, NodeJoined)]
    assert joined
    assert max(len("".join(event.unknown_labels)) for event in joined) < 10_000


def test_the_node_with_the_most_labels_goes_if_there_are_too_many() -> None:
    """997 and 1,000 invented labels, all different or all the same."""
    invented = [{f"{n}-{i}": 1 for i in range(997 + 3 * n)} for n in range(2)]
    for others in (invented, [invented[1]] * 2):
        nodes = {7: hospital("a", flu=3, ok=2, burn=1)}
        nodes |= {8 + n: hospital(f"{n}", **labels) for n, labels in enumerate(others)}
        found = gathered(HospitalGrid(nodes))
        assert {"flu", "ok", "burn"} <= {*found.classes}
        assert len(found.classes) <= MOST_LABELS
        assert 9 in found.left_out
        assert 7 not in found.left_out


@pytest.mark.parametrize(
    "wrong",
    [
        {"losses": [3.4e38]},
        {"losses": [1e7]},
        {"seconds": [3.4e38]},
        {"wire": [2**62, 0]},
        {"wire": [0, MOST_WIRE_BYTES + 1]},
    ],
    ids=str,
)
def test_figures_that_would_spoil_a_report_are_refused(wrong: dict[str, Any]) -> None:
    right = {"losses": [1e6], "seconds": [1e6], "wire": [0, MOST_WIRE_BYTES]}
    assert read_report(answer(**right), ASKED)
    with pytest.raises(MessageError, match=f"its {next(iter(wrong))[:4]}"):
        read_report(answer(**right | wrong), ASKED)


@pytest.mark.parametrize(
    "name", ["clients", "examples", "losses", "seconds", "payloads", "failures"]
)
def test_a_list_longer_than_the_clients_asked_is_only_counted(name: str) -> None:
    many = dict.fromkeys(range(10**5), "x") if name == "failures" else [0] * 10**5
    told = f"it has 100000 {name}; allowed: up to 1, one for each client asked"
    with pytest.raises(MessageError, match=f"^{told}$"):
        read_report(answer(**{name: many}), ASKED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": [*range(1, 10**4 + 1)]},
        {"clients": [0] * 10**4},
        {"clients": [float(client) for client in range(10**4)]},
        {"examples": [-1] * 10**4},
        {"payloads": [-1] * 10**4},
        {"losses": [-1.0] * 10**4},
        {"seconds": [-1.0] * 10**4},
        {"failures": dict.fromkeys(range(10**4), "x")},
        {"wire": [0] * 10**4},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_an_error_about_a_list_is_short(wrong: dict[str, Any]) -> None:
    """Whatever a node of many clients answers."""
    everyone = dict.fromkeys(range(10**4), 3)
    asked = replace(ASKED, examples={7: everyone})
    right: dict[str, Any] = {"clients": [*everyone]}
    right |= {"examples": [3] * 10**4, "payloads": [1] * 10**4}
    right |= {"losses": [1.0] * 10**4, "seconds": [1.0] * 10**4}
    assert read_report(answer(**right), asked)
    with pytest.raises(MessageError) as caught:
        read_report(answer(**right | wrong), asked)
    assert len(str(caught.value)) < 400


FORMULAS = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", " =1"]


def test_no_cell_of_a_csv_is_a_formula(tmp_path: Path) -> None:
    columns = [Column("reason", "reason"), Column("times", "times", "d")]
    table = Table("failures", "", columns, [[f, -1] for f in [*FORMULAS, "-1", "a=b"]])
    write_csv(table, tmp_path / "page.csv")
    write_rows(tmp_path / "rows.csv", [{"run": f, "n": -1} for f in FORMULAS])
    for name, expected in (
        ("page.csv", [f"'{f}" for f in FORMULAS] + ["-1", "a=b"]),
        ("rows.csv", [f"'{f}" for f in FORMULAS]),
    ):
        with (tmp_path / name).open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        assert [row[0] for row in rows] == expected
        assert {row[1] for row in rows} == {"-1"}


def test_a_page_may_load_and_run_nothing() -> None:
    section = Section("a", ["<img src=x>"])
    page = render(Page("<script>alert(1)</script>", "", [section]))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    assert 0 < page.find(meta) < page.index("<title>")
    assert "<script" not in page
    assert "<img" not in page
