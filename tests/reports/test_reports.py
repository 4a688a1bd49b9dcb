"""Reports of runs: their figures by hand, what they hold, and what they refuse."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slora_flwr.cli import app
from slora_flwr.config import ConfigError, Value
from slora_flwr.reports.charts import COLOURS, GREY, INK, PALETTE
from slora_flwr.reports.comparison_page import compare
from slora_flwr.reports.groups import Group, curve, group_runs, modelled_seconds
from slora_flwr.reports.page import Page, Table, render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.events import (
    EVENTS,
    ClassRecord,
    ClientsFailed,
    Event,
    NodeJoined,
    NodeLeftOut,
    to_line,
)
from slora_flwr.runs.reader import by_layer, find_runs, read_run
from slora_flwr.runs.roster import ROSTER, write_roster
from tests.support.recorded import DOWN, write_run
from tests.support.runs import Config

HOSTILE = "</svg><script>alert('$x^2$ & \"')</script>"


def groups_of(*paths: Path) -> list[Group]:
    return group_runs(map(read_run, paths))


def page_of(
    *paths: Path, target: float | None = None, names: Mapping[str, str] | None = None
) -> Page:
    return compare([read_run(path) for path in paths], (1, 10), target, names or {})


def table_of(page: Page, name: str) -> Table:
    tables = [table for section in page.sections for table in section.tables]
    return next(table for table in tables if table.name == name)


def rows_of(page: Page, name: str) -> list[dict[str, object]]:
    table = table_of(page, name)
    names = [column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


def slora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_failure_names_its_node_as_the_log_does(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", failures=["bad"])
    told: list[Event] = []
    for node, name, client in ((5, "a", 3), (6, "node 0", 0), (8, "node 8", 4)):
        told.append(
            NodeJoined(
                node=node,
                name=name,
                client=client,
                examples=3,
                skipped={},
                unknown_labels=[],
            )
        )
        told.append(ClientsFailed(round=2, node=node, clients=[client], reason="bad"))
    told.append(NodeLeftOut(node=5, name="a (node 5)", reason="gone"))
    told.append(
        ClientsFailed(
            round=2, node=9, name="st-mary (node 9)", clients=[5], reason="bad"
        )
    )
    with (path / EVENTS).open("a") as file:
        file.writelines(map(to_line, told))
    named = [failure.node for failure in read_run(path).failures]
    joined = ["node 4", "a (node 5)", "node 0", "node 8", "a (node 5)"]
    assert named == [*joined, "st-mary (node 9)"]
    [bad, gone] = rows_of(report(read_run(path)), "reasons")
    assert (bad["nodes"], gone["nodes"]) == (5, 1)


def test_a_round_lasts_as_long_as_transfer_and_the_slowest_client(
    tmp_path: Path,
) -> None:
    path = write_run(tmp_path / "run")
    # (2 MB + 1 MB) * 8 bit / 1 Mbit/s = 24 s, and 5 s of training.
    assert modelled_seconds(read_run(path), 1) == pytest.approx([29, 58, 87])
    assert modelled_seconds(read_run(path), 10) == pytest.approx([7.4, 14.8, 22.2])
    # An attempt at round 2 that nobody answered, and messages that are no payload.
    with (path / "ledger.csv").open("a") as file:
        file.write(f"2,lora,down,2,{2 * DOWN},0\n2,lora,up,0,0,9\n2,lora,down,0,0,9\n")
    assert modelled_seconds(read_run(path), 1) == pytest.approx([29, 74, 103])


def test_runs_that_differ_by_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    configs: list[Config] = [
        {},
        {"seed": 3},
        {"seed": 3, "run.target": 0.5},
        {"sparse.density": 0.5},  # which lora does not have
        {"lora.lr": 0.01},
        {"method": "fft", "lora.rank": 2},
        {"clients.partitioner": "iid", "clients.alpha": 9.0},
    ]
    paths = [write_run(tmp_path / str(i), config) for i, config in enumerate(configs)]
    groups = groups_of(*paths)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("lora iid lora.lr=0", 1),
        ("lora alpha=0.1 lora.lr=0", 4),
        ("lora alpha=0.1 lora.lr=0.01", 1),
        ("fft alpha=0.1", 1),
    ]
    assert [run.config["seed"] for run in groups[1].runs] == [0, 0, 3, 3]


def test_wire_bytes_are_shown_where_nodes_count_them(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", accuracies=[0.2])
    other = write_run(tmp_path / "other", {"lora.rank": 2}, accuracies=[0.2])
    assert "wire_megabytes_up" not in rows_of(report(read_run(path)), "phases")[0]
    assert "wire_megabytes_up" not in rows_of(page_of(path, other), "results")[0]
    with (path / "ledger.csv").open("w") as file:
        file.write("round,phase,direction,clients,payload_bytes,message_bytes,")
        file.write("planned_payload_bytes,wire_bytes\n")
        file.write("1,lora,down,2,9,9,,3000000\n1,lora,up,2,9,9,,\n")
        file.write("2,lora,down,2,9,9,,4500000\n2,lora,up,2,9,9,,1000000\n")
    [phase, whole] = rows_of(report(read_run(path)), "phases")
    results = rows_of(page_of(path, other), "results")
    counted = {row["wire_megabytes_up"]: row for row in results}
    assert counted.keys() == {1.0, None}
    for row in (phase, whole, counted[1.0]):
        assert (row["wire_megabytes_up"], row["wire_megabytes_down"]) == (1.0, 7.5)


def test_a_comparison_leads_to_reports_that_there_are(tmp_path: Path) -> None:
    names = ("a#1 <b>", "b")
    paths = [write_run(tmp_path / "runs" / name, {}) for name in names]
    assert slora("report", paths[0]).exit_code == 0
    out = tmp_path / "comparison"
    assert slora("compare", *paths, "--out", out).exit_code == 0
    html = (out / "compare.html").read_text()
    assert re.findall('<a href="([^"]*)">', html) == [
        "../runs/a%231%20%3Cb%3E/report.html"
    ]


def test_a_comparison_has_the_curve_of_the_last_state_too(tmp_path: Path) -> None:
    path, other = (
        write_run(tmp_path / n, {"lora.rank": r}) for n, r in (("a", 2), ("b", 4))
    )
    events = path / EVENTS
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for line in lines:
        line["plain_accuracy"] = 0.125
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [curves] = [s for s in page_of(path, other).sections if s.title == "Curves"]
    labels = [key.caption for key in curves.keys]
    assert [label for label in labels if "not averaged" in label] == [
        f"{labels[0]}, last state, not averaged"
    ]
    assert "last state, not averaged, from 12.5 to 12.5" in curves.charts[0].told


def test_labels_name_what_differs(tmp_path: Path) -> None:
    configs: list[Config] = [
        {"method": method, "clients.alpha": alpha, "sparse.density": density}
        for method, alpha, density in (
            ("slora", 0.1, 0.02),
            ("slora", 0.1, 0.01),
            ("slora", 1.0, 0.02),
            ("lora", 0.1, 0.02),
        )
    ]
    paths = [write_run(tmp_path / str(i), config) for i, config in enumerate(configs)]
    assert [group.label for group in groups_of(*paths)] == [
        "slora alpha=1 density=0.02",
        "slora alpha=0.1 density=0.01",
        "slora alpha=0.1 density=0.02",
        "lora alpha=0.1",
    ]


def test_a_group_that_no_short_label_tells_gets_a_letter(tmp_path: Path) -> None:
    configs: list[Config] = [
        {"lora.targets": "query,key,value,attention.output.dense,output.dense"},
        {"lora.targets": "query"},
        {"lora.targets": "key", "upload.dtype": "int8"},
    ]
    paths = [write_run(tmp_path / str(i), config) for i, config in enumerate(configs)]
    page = page_of(*paths)
    assert [row["group"] for row in rows_of(page, "results")] == [
        "lora targets=key upload.dtype=int8",
        "lora targets=query",
        "lora A",
    ]
    keys = ("method", "lora.targets", "upload.dtype")
    assert [tuple(map(row.get, keys)) for row in rows_of(page, "groups")] == [
        ("lora", "key", "int8"),
        ("lora", "query", "float32"),
        ("lora", configs[0]["lora.targets"], "float32"),
    ]
    # Labels that tell everything need no table.
    assert "Groups" not in [section.title for section in page_of(*paths[1:]).sections]


def test_rates_that_are_written_alike_are_two_groups(tmp_path: Path) -> None:
    rates = (0.12345671, 0.12345672)
    paths = [write_run(tmp_path / f"{rate}", {"lora.lr": rate}) for rate in rates]
    page = page_of(*paths, target=0.1)
    assert [row["group"] for row in rows_of(page, "results")] == ["lora A", "lora B"]
    assert [row["lora.lr"] for row in rows_of(page, "groups")] == list(map(str, rates))
    assert len(rows_of(page, "target")) == 2


def test_groups_get_the_names_that_are_given(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"run-{alpha}", {"clients.alpha": alpha}, ended=alpha < 9)
        for alpha in (0.1, 1.0, 10.0)
    ]
    out = tmp_path / "out"
    named = ["lora alpha=0.1=uneven", f"{paths[1].name}=some", "lora alpha=10=even"]
    options = [part for name in named for part in ("--name", name)]
    done = slora("compare", *paths, "--out", out, *options)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((out / "compare-groups.csv").open()))
    assert [(row["group"], row["heterogeneity"]) for row in rows] == [
        ("even (stopped)", "alpha=10"),
        ("some", "alpha=1"),
        ("uneven", "alpha=0.1"),
    ]
    html = (out / "compare.html").read_text()
    assert "lora alpha" not in html
    for given, told in {
        "uneven": "--name is 'uneven'; allowed: GROUP=NAME",
        "lora=x": "--name is 'lora=x'; allowed: GROUP=NAME, where GROUP is one of",
        f"run-0.1={'x' * 49}": "characters",
    }.items():
        done = slora("compare", *paths, "--out", out, "--name", given)
        assert done.exit_code == 2
        assert told in done.stderr
    twice = ["--name", "run-0.1=x", "--name", "run-1.0=x"]
    done = slora("compare", *paths, "--out", out, *twice)
    assert "--name is 'x'; allowed: another NAME for each group" in done.stderr


def test_runs_that_an_edited_study_no_longer_has_are_left_out(tmp_path: Path) -> None:
    study = tmp_path / "results" / "few"
    kept, gone = (
        write_run(study / f"lora-rank{rank}", {"lora.rank": rank}) for rank in (4, 8)
    )
    other = write_run(tmp_path / "results" / "other" / "run", {"lora.rank": 16})
    write_roster(study, "few", [gone.name])
    write_roster(study, "few", [kept.name])
    out = tmp_path / "out"

    def compared(*given: Path) -> set[str]:
        done = slora("compare", *given, "--out", out)
        assert done.exit_code == 0, done.output
        is_told = f"Left out of {study}" in done.stderr and gone.name in done.stderr
        assert is_told == (f"Left out of {study}" in (out / "compare.html").read_text())
        rows = list(csv.DictReader((out / "compare-runs.csv").open()))
        found = {row["run"].split("/")[-1] for row in rows}
        assert is_told != (gone.name in found)
        return found

    assert compared(study) == {kept.name}
    assert compared(tmp_path / "results") == {kept.name, other.name}
    assert compared(study, gone) == {kept.name, gone.name}
    # A second study that was swept into the same folder.
    write_roster(study, "more", [gone.name])
    done = slora("compare", study, "--out", out)
    assert "Left out" not in done.stderr
    (study / ROSTER).unlink()
    assert compared(study) == {kept.name, gone.name}
    (study / ROSTER).write_text('{"few": [1]}')
    done = slora("compare", study, "--out", out)
    assert done.exit_code == 2
    assert "studies.json: few.0 is 1; allowed: a valid string" in done.stderr


def test_figures_by_class_and_confusions_by_hand(tmp_path: Path) -> None:
    # Labels a, b, c, d: 6, 3, 1 and 0 examples.
    #     a b c d
    # a [ 4 2 0 0 ]
    # b [ 1 2 0 0 ]
    # c [ 1 0 0 0 ]
    found = ClassRecord([4, 2, 0, 0], [6, 4, 0, 0], [6, 3, 1, 0], [(0, 1, 2)])
    assert not found.is_whole
    found = replace(found, confused=[(0, 1, 2), (1, 0, 1), (2, 0, 1)])
    assert found.is_whole
    path = write_run(
        tmp_path / "run", classes=found, facts={"classes": ["a", "b", "c", "d"]}
    )
    page = report(read_run(path))
    rows = [tuple(row.values()) for row in rows_of(page, "classes")]
    assert rows == [
        ("c", 1, None, 0, 0),
        ("b", 3, 50, pytest.approx(200 / 3), pytest.approx(4 / 7)),
        ("a", 6, pytest.approx(200 / 3), pytest.approx(200 / 3), pytest.approx(2 / 3)),
        ("d", 0, None, None, None),
    ]
    matrix = table_of(page, "confusion")
    assert matrix.rows == [
        ["a", 4, 2, 0, 0],
        ["b", 1, 2, 0, 0],
        ["c", 1, 0, 0, 0],
        ["d", 0, 0, 0, 0],
    ]
    assert matrix.shades[0][1:3] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert matrix.shades[3] == [0] * 5
    assert [tuple(row.values()) for row in rows_of(page, "confused")] == [
        ("a", "b", 2, pytest.approx(100 / 3)),
        ("b", "a", 1, pytest.approx(100 / 3)),
        ("c", "a", 1, 100),
    ]
    html = render(page)
    assert "10 test examples after round 3, with 3 of 4 classes" in html
    assert "1 of these is never predicted" in html
    assert 'style="--share: 0.667">4</td>' in html


def test_many_classes_are_the_worst_ones_and_the_commonest_confusions(
    tmp_path: Path,
) -> None:
    count = 1000
    pairs = [(i, (i + 1) % count, 900 - i) for i in range(800)]
    labels = [1000] * count
    right = [1000 - (900 - i if i < 800 else 0) for i in range(count)]
    found = ClassRecord(right, labels, labels, pairs)
    names = [f"class {i}" for i in range(count)]
    path = write_run(tmp_path / "run", classes=found, facts={"classes": names})
    page = report(read_run(path))
    worst = rows_of(page, "worst-classes")
    assert [row["class"] for row in worst] == names[:20]
    assert len(rows_of(page, "classes")) == 500
    assert len(rows_of(page, "confused")) == 10
    assert "confusion" not in {t.name for s in page.sections for t in s.tables}
    html = render(page)
    assert len(html.encode()) < 300_000
    check_page(html)


def test_without_the_servers_test_data_no_class_is_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", facts={"test_examples": 0})
    assert "this run has none of" in render(report(read_run(path)))
    older = write_run(tmp_path / "older")
    titles = [section.title for section in report(read_run(older)).sections]
    assert "Classes" not in titles


def test_counts_of_other_classes_are_one_clear_error(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", classes=ClassRecord([1], [1], [1], []))
    events = path / "events.jsonl"
    text = events.read_text()
    for bad in ('"confused": [[0, 1, 1]]', '"confused": [], "labels": [1, 1]'):
        events.write_text(text.replace('"confused": []', bad))
        done = slora("report", path)
        assert done.exit_code == 2
        assert "events.jsonl: line 3: classes is" in done.stderr
        assert done.stderr.count("\n") == 1


def test_every_colour_can_be_told_from_the_paper() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted(map(light, (one, other)))
        return (high + 0.05) / (low + 0.05)

    for colour in (*COLOURS, GREY, INK):
        assert contrast(colour, "#ffffff") >= 3
        assert contrast(PALETTE[colour][1], "#16181a") >= 3
    html = render(Page("title", "", ()))
    assert "--paper: #fff;" in html
    assert "--paper: #16181a;" in html


def test_coded_runs_are_held_against_plain_full_fine_tuning(tmp_path: Path) -> None:
    configs: list[Config] = [
        {"method": "lora"},
        {"method": "lora", "upload.dtype": "int8", "download.lossless": True},
        {"method": "fft"},
    ]
    paths = [write_run(tmp_path / str(i), config) for i, config in enumerate(configs)]
    assert [group.label for group in groups_of(*paths)] == [
        "lora",
        "lora upload.dtype=int8 download.lossless=True",
        "fft",
    ]
    assert len(rows_of(page_of(*paths), "target")) == 3


def test_handoffs_are_told_apart_where_there_is_one(tmp_path: Path) -> None:
    last: Config = {"method": "slora", "server.handoff": "last"}
    configs: list[Config] = [
        last,
        {"method": "slora"},
        {"method": "lora", "server.handoff": "last"},
        {"method": "fft"},
    ]
    paths = [write_run(tmp_path / str(i), config) for i, config in enumerate(configs)]
    labels = ["slora handoff=average", "slora handoff=last", "lora", "fft"]
    assert sorted(group.label for group in groups_of(*paths)) == sorted(labels)
    # Each is measured by full fine-tuning, which hands nothing over.
    assert len(rows_of(page_of(*paths), "target")) == 4


def test_results_are_means_over_seeds(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", {"seed": 0}, (0.1, 0.2, 0.2, 0.2, 0.2, 0.7)),
        write_run(tmp_path / "b", {"seed": 1}, (0.9, 0.3, 0.3, 0.3, 0.3, 0.3)),
    ]
    (row,) = rows_of(page_of(*paths), "results")
    # The last five: 0.3 in both. The last: 0.7 and 0.3, √(2 · 0.2²) apart from 0.5.
    assert (row["runs"], row["seeds"], row["rounds"]) == (2, "0, 1", 6)
    assert row["accuracy_percent"] == pytest.approx(50)
    assert row["accuracy_sd"] == pytest.approx(28.2842712)
    assert row["last_5_percent"] == pytest.approx(30)
    assert row["last_5_sd"] == pytest.approx(0, abs=1e-9)
    assert row["macro_f1"] == pytest.approx(0.25)
    assert (row["megabytes_up"], row["megabytes_down"]) == (12, 24)
    assert row["seconds"] == 99


def test_the_target_is_reached_by_the_mean_curve(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", {"seed": 0}, (0.2, 0.3, 0.6)),
        write_run(tmp_path / "b", {"seed": 1}, (0.4, 0.6, 0.8)),
    ]
    page = page_of(*paths, target=0.5)
    # Means 0.3, 0.45, 0.7: the third of rounds of 6 MB and 29 or 7.4 seconds.
    (row,) = rows_of(page, "target")
    assert (row["round"], row["megabytes"]) == (3, pytest.approx(18))
    assert row["seconds_at_1"] == pytest.approx(87)
    assert row["seconds_at_10"] == pytest.approx(22.2)
    (row,) = rows_of(page_of(*paths, target=0.71), "target")
    assert row["round"] is row["megabytes"] is row["seconds_at_1"] is None
    assert "target" not in [section.title for section in page_of(*paths).sections]


def test_the_target_is_a_point_below_full_fine_tuning(tmp_path: Path) -> None:
    fft: Config = {"method": "fft"}
    paths = [
        # Full fine-tuning twice in lora's setting; its rate is its own affair.
        write_run(tmp_path / "bad", fft | {"train.lr": 1.0}, [0.1] * 6),
        write_run(tmp_path / "fft", fft, (0.9, 0.5, 0.5, 0.5, 0.5, 0.6)),
        write_run(tmp_path / "lora", {"lora.lr": 0.1}, (0.5, 0.509, 0.511)),
        write_run(tmp_path / "other", {"lora.lr": 0.1, "clients.count": 30}),
    ]
    rows = {row["group"]: row for row in rows_of(page_of(*paths), "target")}
    assert "lora count=30" not in rows  # nothing to measure it by
    row = rows["lora count=20"]
    assert row["target_percent"] == pytest.approx(51)
    assert row["round"] == 3


def test_the_gap_to_full_fine_tuning_by_heterogeneity(tmp_path: Path) -> None:
    runs: list[tuple[float, Config]] = [
        (0.50, {"method": "fft", "clients.alpha": 0.1}),
        (0.80, {"method": "fft", "clients.alpha": 10.0}),
        (0.47, {"clients.alpha": 0.1, "lora.lr": 0.1}),
        (0.80, {"clients.alpha": 10.0, "lora.lr": 0.2}),
        (0.81, {"clients.partitioner": "iid"}),
        (0.10, {"clients.alpha": 0.1, "clients.count": 99}),
    ]
    paths = [
        write_run(tmp_path / str(i), config, [accuracy] * 2)
        for i, (accuracy, config) in enumerate(runs)
    ]
    page = page_of(*paths)
    rows = rows_of(page, "heterogeneity-1")
    assert [row["method"] for row in rows] == ["lora", "fft"]
    assert [n for n in rows[0] if "gap" not in n] == [
        "method",
        "iid",
        "alpha=10",
        "alpha=0.1",
    ]
    lora, fft = rows
    assert lora["alpha=0.1"] == pytest.approx(47)
    assert lora["alpha=0.1 gap"] == pytest.approx(-3)
    assert lora["alpha=10 gap"] == pytest.approx(0)
    assert (lora["iid"], lora["iid gap"]) == (pytest.approx(81), None)
    assert fft["iid"] is None
    assert len([s for s in page.sections for t in s.tables if "gap" in t.caption]) == 1


def test_two_rates_for_one_heterogeneity_are_two_variants(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", {"method": "fft"}),
        write_run(tmp_path / "b", {"lora.lr": 0.1}),
        write_run(tmp_path / "c", {"lora.lr": 0.2}),
    ]
    rows = rows_of(page_of(*paths), "heterogeneity")
    names = [row["method"] for row in rows]
    assert names == ["lora lora.lr=0.1", "lora lora.lr=0.2", "fft"]


def test_sections_without_anything_to_compare_are_left_out(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    titles = [section.title for section in page.sections]
    assert titles == ["Results", "Curves", "Spread over clients", "Runs"]


def test_runs_near_the_majority_class_are_named(tmp_path: Path) -> None:
    near, clear = write_run(tmp_path / "near"), write_run(tmp_path / "clear")
    told = json.loads((near / "summary.json").read_text())
    (near / "summary.json").write_text(json.dumps(told | {"warning": "It is near."}))
    assert "in 1 of 2 runs: near. " in page_of(near, clear).notice
    assert page_of(clear).notice == ""


def test_runs_that_repeat_a_seed_are_named(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, {"seed": seed})
        for name, seed in (("a", 0), ("b", 1), ("again", 0))
    ]
    told = "Runs that repeat a seed of their group: again. They say"
    assert told in page_of(*paths).notice
    assert page_of(*paths[:2]).notice == ""


def test_runs_for_tuning_are_left_out(tmp_path: Path) -> None:
    tested = write_run(tmp_path / "tested")
    tuning = write_run(tmp_path / "tuning", {"data.validation": 0.1}, [0.9] * 3)
    (row,) = rows_of(page_of(tested, tuning), "results")
    assert row["accuracy_percent"] == pytest.approx(40)
    assert "1 of the runs are left out" in page_of(tested, tuning).notice
    (row,) = rows_of(page_of(tuning), "results")
    assert row["accuracy_percent"] == pytest.approx(90)


def test_the_spread_is_that_of_clients_in_the_last_fifth(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"rounds": 10}, [0.1] * 10)
    # The last two of ten rounds, with losses 1/9 and 1/10, of two clients alike.
    (row,) = rows_of(page_of(path), "spread")
    assert row["clients"] == 2
    assert row["minimum"] == row["maximum"] == pytest.approx((1 / 9 + 1 / 10) / 2)


def test_energies_by_kind_and_layer(tmp_path: Path) -> None:
    assert by_layer({"encoder.layer.0.a.q": 0.1, "encoder.layer.11.a.q": 0.3}) == {
        "a.q": {0: 0.1, 11: 0.3}
    }
    assert by_layer({"groups.0.layers.0.q": 0.1, "groups.1.layers.0.q": 0.3}) == {
        "groups.0.layers.q": {0: 0.1},
        "groups.1.layers.q": {0: 0.3},
    }
    paths = [
        write_run(
            tmp_path / str(seed),
            {"method": "slora", "seed": seed},
            energies={"layer.0.q": 0.1 + 0.2 * seed, "layer.1.q": 0.5},
        )
        for seed in (0, 1)
    ]
    (row,) = rows_of(page_of(*paths), "energies")
    assert row["layer_0"] == pytest.approx(20)
    assert row["mean"] == pytest.approx(35)


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    config: Config = {"method": "slora", "sparse.rounds": 2}
    path = write_run(tmp_path / "run", config, ended=False)
    with (path / "events.jsonl").open("a") as file:
        file.write('{"event": "round", "sec')  # killed while it wrote
    html = render(report(read_run(path)))
    assert "This run is not complete: 3 of 6 rounds are done." in html
    assert "It was stopped: TooFewRepliesError: 0 good replies twice" in html
    rows = rows_of(report(read_run(path)), "phases")
    assert [(r["phase"], r["rounds"], r["seconds"]) for r in rows] == [
        ("sparse", 2, 20),
        ("lora", 1, 10),
        ("slora", 3, 30),
    ]
    assert [group.label for group in groups_of(path)] == ["slora (stopped)"]
    ended = write_run(tmp_path / "ended", config | {"seed": 1})
    (group,) = groups_of(path, ended)
    assert [run.path for run in group.runs] == [ended]
    assert "1 of the runs did not complete" in render(page_of(path, ended))


def test_a_run_without_a_round_has_a_report(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", accuracies=(), ended=False)
    assert "0 of 6 rounds are done" in render(report(read_run(path)))
    (path / "events.jsonl").unlink()
    titles = [section.title for section in report(read_run(path)).sections]
    assert titles == ["Phases", "Config"]
    assert "lora (stopped)" in render(page_of(path))


def test_a_round_that_was_held_again_counts_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", accuracies=(0.2, 0.3))
    lines = (path / "events.jsonl").read_text().splitlines()
    again = json.loads(lines[-1]) | {"accuracy": 0.9}
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert [r.metrics["accuracy"] for r in read_run(path).rounds] == [0.2, 0.9]


def test_only_evaluations_that_all_runs_held_are_on_the_curve(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", {"seed": 0}, (0.2, 0.3, 0.4)),
        write_run(tmp_path / "b", {"seed": 1}, (0.4, 0.5)),
    ]
    (group,) = groups_of(*paths)
    points = curve(group, [1])
    assert [(p.round, p.accuracy) for p in points] == [
        (1, pytest.approx(0.3)),
        (2, pytest.approx(0.4)),
    ]
    assert [p.megabytes for p in points] == pytest.approx([6, 12])
    assert [p.seconds for p in points] == [pytest.approx([29]), pytest.approx([58])]


def test_planned_bytes_stand_beside_those_sent(tmp_path: Path) -> None:
    path = write_run(tmp_path / "planned", planned=500_000)
    (row, _) = rows_of(report(read_run(path)), "phases")
    assert (row["payload_megabytes_up"], row["planned_megabytes_up"]) == (6, 1.5)
    (row, _) = rows_of(report(read_run(write_run(tmp_path / "other"))), "phases")
    assert "planned_megabytes_up" not in row


class Reader(HTMLParser):
    """Collects what a page loads, its ids, and tags that are not closed in order."""

    VOID = ("meta", "br", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.unlabelled = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [v or "" for k, v in attrs if k.endswith(("src", "href"))]
        self.loads += re.findall(r"url\(([^)]*)\)", found.get("style") or "")
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.unlabelled += tag == "svg" and not found.get("aria-label")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> None:
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    assert all(load.startswith("#") for load in reader.loads)
    assert {load[1:] for load in reader.loads} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.unlabelled == 0
    assert "<script" not in html
    assert not re.search(r"https?:|@import|@font-face", html)


def test_pages_load_nothing_and_hostile_text_stays_text(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / str(seed),
            {"method": "slora", "seed": seed, "data.name": f"{HOSTILE}{seed}"},
            failures=[HOSTILE],
            energies={f"layer.0.{HOSTILE}": 0.1},
            classes=ClassRecord([2, 1], [3, 2], [3, 2], [(0, 1, 1), (1, 0, 1)]),
            facts={"classes": [HOSTILE[:30], "b"]},
        )
        for seed in (0, 1)
    ]
    names = {"slora A": HOSTILE}
    pages = [render(report(read_run(paths[0]))), render(page_of(*paths, names=names))]
    assert pages[1] == render(page_of(*paths, names=names))
    # In a drawing too, where it is no formula either.
    assert re.search(r"<text[^>]*>&lt;/svg&gt;[^<]*\$x\^2\$", pages[1])
    for html in pages:
        check_page(html)
        assert html.count("&lt;/svg&gt;&lt;script&gt;alert(") >= 2


def test_tables_as_csv_and_latex(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / str(seed), {"seed": seed}, failures=["50% & a_b <\\"])
        for seed in (0, 1)
    ]
    out = tmp_path / "out"
    done = slora("compare", *paths, "--out", out, "--target", "0.3", "--uplink", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out / 'compare.html'}\n"
    lines = (out / "compare-target.csv").read_text().splitlines()
    assert lines == [
        "group,target_percent,round,megabytes,seconds_at_1",
        "lora,30,2,12,58",
    ]
    assert (out / "compare-target.tex").read_text().splitlines() == [
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{lrrrr}",
        "\\toprule",
        "group & target, \\% & round & MB & s at 1 Mbit/s \\\\",
        "\\midrule",
        "lora & 30.0 & 2 & 12.00 & 58.0 \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]
    escaped = "lora & 2 & 50\\% \\& a\\_b \\textless{}\\textbackslash{} \\\\"
    assert escaped in (out / "compare-failures.tex").read_text()
    curves = list(csv.DictReader((out / "compare-curves.csv").open()))
    assert [row["mean_percent"] for row in curves] == ["20", "30", "40"]


def test_a_page_of_twelve_groups_is_small(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / f"{method}-{alpha}-{seed}",
            {"method": method, "seed": seed, "clients.alpha": alpha, "rounds": 100},
            [0.1 + 0.001 * i + 0.01 * seed for i in range(100)],
        )
        for method in ("slora", "sft", "lora", "fft")
        for alpha in (0.1, 1.0, 10.0)
        for seed in (0, 1)
    ]
    html = render(page_of(*paths))
    assert len(html.encode()) < 1_000_000
    check_page(html)


def test_runs_are_found_by_path_name_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path))
    runs = tmp_path / "runs"
    first = write_run(runs / "20260101-lora-1")
    second = write_run(runs / "20260102-lora-2")
    nested = write_run(runs / "study" / "a" / "seed-0")
    assert find_runs([str(first), first.name]) == [first]
    assert find_runs(["study", str(second)]) == [nested, second]
    assert find_runs([str(runs)]) == [first, second, nested]
    assert slora("report", first.name).stdout == f"{first / 'report.html'}\n"
    assert slora("report").stdout == f"{second / 'report.html'}\n"
    assert "lora on stdlib-docs" in (second / "report.html").read_text()
    out = tmp_path / "new" / "page.html"
    assert slora("report", nested, "--out", out).exit_code == 0
    assert out.is_file()


def test_a_run_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path))
    damaged = write_run(tmp_path / "damaged")
    (damaged / "config.toml").write_text("method = ")
    other = tmp_path / "other"
    other.mkdir()
    for arguments, told in {
        ("report",): f"{tmp_path / 'runs'} holds no run; allowed: a run directory",
        ("report", other): f"{other} is not a run; allowed: a run directory, which",
        ("compare", other): f"{other} is not a run; allowed: a run directory, which",
        ("compare", "absent"): "absent is not a run; allowed: a run directory, which",
        ("report", damaged): f"{damaged} cannot be read as a run directory",
        ("compare", damaged, "--uplink", "1,fast"): "--uplink is '1,fast'; allowed",
        ("compare", damaged, "--uplink", "0"): "--uplink is '0'; allowed: comma",
    }.items():
        done = slora(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"Error: {told}")
        assert done.stderr.count("\n") == 1


def test_reports_need_no_torch(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    code = (
        "import sys; from slora_flwr.cli import app\n"
        f"for command in ['report'], ['compare', '--out', {str(tmp_path)!r}]:\n"
        f"    app([*command, {str(path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Language models


def write_language_run(
    path: Path, perplexities: tuple[float, ...], **config: Value
) -> Path:
    told: Config = {"task": "causal-lm", **config}
    facts = {"classes": [], "test_examples": 8}
    return write_run(path, told, perplexities=perplexities, facts=facts)


def test_a_language_models_page_is_of_perplexity(tmp_path: Path) -> None:
    page = report(read_run(write_language_run(tmp_path / "a", (9.5, 4.25, 5.5))))
    told = dict(page.figures)
    assert told["perplexity, round 3"] == "5.50"
    assert told["best perplexity, round 2"] == "4.25"
    assert told["mean of the last 5 evaluations"] == "6.42"
    assert (told["accuracy"], told["ROUGE-L"]) == ("40.0%", "0.300")
    [curves] = [s for s in page.sections if s.title == "Perplexity"]
    assert curves.charts[0].caption == "Perplexity against round; at the end 5.50."
    assert rows_of(page, "phases")[0]["perplexity"] == 5.5
    assert "ajority" not in render(page)
    assert not [s for s in page.sections if s.title == "Classes"]


def test_language_models_are_compared_by_perplexity(tmp_path: Path) -> None:
    paths = [
        write_language_run(tmp_path / "a", (9.0, 5.0, 4.0), seed=0),
        write_language_run(tmp_path / "b", (9.0, 5.0, 2.0), seed=1),
        write_language_run(tmp_path / "c", (9.0, 8.0, 7.0), method="fft"),
    ]
    page = page_of(*paths)
    lora, fft = sorted(rows_of(page, "results"), key=lambda row: -int(str(row["runs"])))
    assert (lora["perplexity"], fft["perplexity"]) == (3.0, 7.0)
    assert lora["last_5"] == pytest.approx((18 / 3 + 16 / 3) / 2)
    assert (lora["accuracy"], lora["rouge_l"]) == (0.4, pytest.approx(0.3))
    assert "macro_f1" not in lora
    [points] = page.data
    assert [column.name for column in points.columns][3:6] == [
        "mean",
        "minimum",
        "maximum",
    ]
    assert [row[3] for row in points.rows if row[0] == fft["group"]] == [9.0, 8.0, 7.0]
    # A hundredth above full fine-tuning's mean of 8.
    rows = {row["group"]: row for row in rows_of(page, "target")}
    assert rows[lora["group"]]["target"] == pytest.approx(8.08)
    assert (rows[lora["group"]]["round"], rows[fft["group"]]["round"]) == (2, 2)
    [row] = [row for row in rows_of(page, "heterogeneity") if row["method"] != "fft"]
    level, gap = [row[name] for name in row if name != "method"]
    assert (level, gap) == (pytest.approx(17 / 3), pytest.approx(17 / 3 - 8))
    assert "Perplexity by heterogeneity" in render(page)
    assert {
        row["target"] for row in rows_of(page_of(*paths, target=4.5), "target")
    } == {4.5}
    with pytest.raises(ConfigError, match=r"--target is 4\.5; allowed: a number from"):
        page_of(write_run(tmp_path / "d"), target=4.5)


def test_the_list_of_runs_tells_perplexities(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", accuracies=(0.2, 0.0))
    write_language_run(tmp_path / "runs" / "two", (9.0, 5.0, 4.0))
    told = slora("runs", tmp_path / "runs").output
    assert "result" in told
    assert "ppl 4.00" in told
    assert "0.0%" in told
