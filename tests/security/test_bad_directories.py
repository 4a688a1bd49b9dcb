"""Run directories that a crash, a copy or a stranger has changed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slora_flwr.cli import app
from slora_flwr.config import ConfigError
from slora_flwr.reports.comparison_page import compare
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.checkpoint_files import checkpoint_path, list_checkpoints
from slora_flwr.runs.reader import RunError, read_run
from slora_flwr.server.run import run
from slora_flwr.wire.messages import Instruction
from tests.support.grids import Grid, RecordingGrid
from tests.support.recorded import DOWN, UP, write_run
from tests.support.resuming import assert_same, go_on, resumed, stop
from tests.support.runs import Config, elsewhere, payloads, start

Change = Callable[[Path], object]
HUGE = 10**400


def slora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Reports


def test_a_report_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path, out = write_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    names = ("compare.html", "compare-results.csv", "compare-results.tex")
    pages = [path / "report.html", *(out / name for name in names)]
    for page in pages:
        page.symlink_to(victim)
    assert slora("report", path).exit_code == 0
    assert slora("compare", path, "--out", out).exit_code == 0
    assert victim.read_text() == "precious"
    for page in pages:
        assert page.is_file()
        assert not page.is_symlink()


def test_pages_follow_the_umask(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    before = os.umask(0o027)
    try:
        assert slora("report", path).exit_code == 0
    finally:
        os.umask(before)
    assert (path / "report.html").stat().st_mode & 0o777 == 0o640


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("command", [["report"], ["compare", "--out", "out"]])
def test_pages_are_utf_8_whatever_the_locale(
    tmp_path: Path, command: list[str]
) -> None:
    path = write_run(tmp_path / "run", failures=["schlecht: größer"])
    code = f"from slora_flwr.cli import app; app({[*command, str(path)]!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ASCII,
        cwd=tmp_path,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    page = path / "report.html" if len(command) == 1 else tmp_path / "out/compare.html"
    assert "schlecht: größer" in page.read_text(encoding="utf-8")


# What is refused


def rounds(at: int = 2, **facts: Any) -> Change:
    """Change the facts of a line of the events."""

    def change(path: Path) -> None:
        file = path / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        lines[at - 1] = json.dumps(json.loads(lines[at - 1]) | facts) + "\n"
        file.write_text("".join(lines))

    return change


def client(**facts: Any) -> Change:
    known = {"examples": 10, "loss": 1.0, "seconds": 1.0}
    return rounds(clients={"0": known, "1": known | facts})


def event(line: str) -> Change:
    return lambda path: (path / "events.jsonl").open("a").write(line + "\n")


def config_of(old: str, new: str) -> Change:
    def change(path: Path) -> None:
        file = path / "config.toml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def summary_of(text: str) -> Change:
    return lambda path: (path / "summary.json").write_text(text)


def row(text: str) -> Change:
    return lambda path: (path / "ledger.csv").open("a").write(text + "\r\n")


def headerless(path: Path) -> None:
    file = path / "ledger.csv"
    file.write_bytes(file.read_bytes().partition(b"\n")[2])


def pipe(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


def folder(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return change


def endless(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to("/dev/zero")

    return change


BAD: dict[str, tuple[Change, str]] = {
    "accuracy-text": (rounds(accuracy="<b>"), "events.jsonl: line 2: metrics.accuracy"),
    "accuracy-list": (rounds(accuracy=[1]), r"line 2: metrics.accuracy is \[1\]; allo"),
    "accuracy-huge": (rounds(accuracy=1e308), "line 2: metrics.accuracy is 1e"),
    "loss-text": (rounds(loss="x"), "line 2: metrics.loss is 'x'; allowed: a valid nu"),
    "seconds-text": (rounds(seconds="x"), "line 2: seconds is 'x'; allowed: a valid n"),
    "seconds-huge": (rounds(seconds=HUGE), "line 2: seconds is 1000"),
    "round-text": (rounds(round="one"), "line 2: round is 'one'; allowed: a valid int"),
    "round-huge": (rounds(round=HUGE), "line 2: round is 1000"),
    "phase-list": (
        rounds(phase=["a"]),
        r"line 2: phase is \['a'\]; allowed: a valid",
    ),
    "payload-text": (rounds(payload_bytes="z"), "line 2: payload_bytes is 'z'; allow"),
    "clients-number": (
        rounds(clients=3),
        "line 2: clients is 3; allowed: a valid dict",
    ),
    "client-number": (rounds(clients={"0": 3}), "line 2: clients.0 is 3; allowed: a"),
    "examples-text": (client(examples="5"), "line 2: clients.1.examples is '5'; allow"),
    "examples-huge": (client(examples=10**30), "line 2: clients.1.examples is 1000"),
    "client-loss": (client(loss=None), "line 2: clients.1.loss is None; allowed: a"),
    "failure-list": (
        event('{"event":"failure","round":1,"node":2,"clients":[1],"reason":["x"]}'),
        r"line 4: reason is \['x'\]; allowed: a valid string",
    ),
    "failure-clients": (
        event('{"event":"failure","round":1,"node":2,"clients":[[1]],"reason":"x"}'),
        r"line 4: clients.0 is \[1\]; allowed: a valid integer",
    ),
    "handoff-text": (
        event('{"event":"handoff","base":"w","energies":{"a.1.b":"x"},"took":1}'),
        "line 4: energies.a.1.b is 'x'; allowed: a valid number",
    ),
    "event-list": (event("[1]"), "line 4: it is "),
    "event-of-lists": (event('{"event": [1]}'), r"line 4: event is \[1\]; allowed: a"),
    "count-text": (
        config_of("count = 20", 'count = "six"'),
        "config.toml: clients.count is 'six'; allowed: a valid integer",
    ),
    "count-huge": (
        config_of("count = 20", f"count = {HUGE}"),
        "config.toml: clients.count is 1000",
    ),
    "rank-list": (
        config_of("rank = 8", "rank = [1, 2]"),
        r"config.toml: lora.rank is \[1, 2\]; allowed: a valid integer",
    ),
    "method-number": (
        config_of('method = "lora"', "method = 5"),
        "config.toml: method is 5; allowed: a valid string",
    ),
    "versions-number": (
        lambda path: (path / "resolved.toml").write_text("versions = 3\n"),
        "resolved.toml: versions is 3; allowed: a valid dictionary",
    ),
    "engine-unknown": (
        lambda path: (path / "resolved.toml").write_text('engine.name = "other"\n'),
        "resolved.toml: name is 'other'; allowed: ",
    ),
    "resolved-missing": (
        lambda path: (path / "resolved.toml").unlink(),
        "resolved.toml: ",
    ),
    "config-deep": (
        lambda path: (path / "config.toml").write_text("a = " + "[" * 200_000),
        "config.toml: ",
    ),
    "summary-list": (summary_of("[1]"), r"summary.json: it is \[1\]; allowed: "),
    "summary-number": (summary_of("5"), "summary.json: it is 5; allowed: "),
    "summary-empty": (summary_of("{}"), "summary.json: seconds is missing"),
    "summary-types": (
        summary_of('{"seconds": 1, "phases": [1]}'),
        r"summary.json: phases is \[1\]; allowed: a valid dictionary",
    ),
    "summary-cut": (summary_of('{"sec'), "summary.json: "),
    "summary-zeros": (summary_of("\0" * 512), "summary.json: "),
    "summary-deep": (summary_of("[" * 200_000), "summary.json: it is nested too deep"),
    "ledger-huge": (
        row(f"1,lora,up,1,{'9' * 4000},1"),
        "ledger.csv: line 8: payload_bytes is '9999",
    ),
    "ledger-infinite": (
        row("1,lora,up,1,5,inf"),
        "line 8: message_bytes is 'inf'",
    ),
    "ledger-short": (row("1,lora"), "ledger.csv: line 8: direction is missing"),
    "ledger-headerless": (headerless, "ledger.csv: line 1: it is not the header, rou"),
    "ledger-zeros": (row("\0" * 512), "ledger.csv: line 8: "),
    "ledger-latin-1": (
        lambda path: (path / "ledger.csv").write_bytes(b"\xff\r\n"),
        "ledger.csv: ",
    ),
    "summary-pipe": (pipe("summary.json"), "summary.json: it is not a regular file"),
    "events-pipe": (pipe("events.jsonl"), "events.jsonl: it is not a regular file"),
    "events-endless": (endless("events.jsonl"), "events.jsonl: it is not a regular f"),
    "events-folder": (folder("events.jsonl"), "events.jsonl: "),
    "summary-folder": (folder("summary.json"), "summary.json: "),
    "ledger-pipe": (pipe("ledger.csv"), "is not a run; allowed: "),
    "config-folder": (folder("config.toml"), "is not a run; allowed: "),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_run_directory_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    path = write_run(tmp_path / "run")
    change, told = BAD[kind]
    change(path)
    with pytest.raises(RunError, match=told) as caught:
        read_run(path)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600 + len(str(path))
    for command in (["report"], ["compare", "--out", tmp_path / "out"]):
        done = slora(*command, path)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1


def test_a_name_that_no_file_can_have_is_no_run() -> None:
    done = slora("report", "a" * 300)
    assert done.exit_code == 2
    assert "is not a run; allowed: " in done.stderr


# What is read all the same


def pages(path: Path) -> tuple[str, str]:
    found = read_run(path)
    return render(report(found)), render(compare([found], (1, 10)))


@pytest.mark.parametrize("line", [b"\0" * 512, b'{"event": "rou', b"[" * 200_000])
def test_lines_that_a_crash_spoilt_are_left_out_and_told(
    tmp_path: Path, line: bytes
) -> None:
    file = write_run(tmp_path / "run") / "events.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([first, line, b"\n", *rest]))
    assert len(read_run(file.parent).rounds) == 3
    of_run, of_runs = pages(file.parent)
    told = "1 of the lines of events.jsonl cannot be read"
    assert told in of_run
    assert f"run: {told}" in of_runs


def test_zeros_at_the_end_of_the_events_are_told(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert "cannot be read" not in "".join(pages(path))
    (path / "events.jsonl").open("ab").write(b"\0" * 512)
    for page in pages(path):
        assert "1 of the lines of events.jsonl cannot be read" in page


def test_half_a_line_of_the_ledger_does_not_count(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with (path / "ledger.csv").open("a") as file:
        file.write(f"4,lora,up,2,{2 * UP}")
    assert read_run(path).total("payload", "up") == 6 * UP
    assert read_run(path).total("payload", "down") == 6 * DOWN


@pytest.mark.parametrize(
    "name", ["config.toml", "resolved.toml", "events.jsonl", "ledger.csv"]
)
def test_a_byte_order_mark_and_line_ends_of_windows_do_no_harm(
    tmp_path: Path, name: str
) -> None:
    file = write_run(tmp_path / "run") / name
    before = read_run(file.parent)
    lines = file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + lines)
    assert read_run(file.parent) == before


@pytest.mark.parametrize(
    "change",
    [
        rounds(3, epsilon=1.0),
        rounds(3, macro_f1=None),
        config_of('partitioner = "dirichlet"', 'partitioner = "later"'),
        event(
            json.dumps(
                {
                    "event": "handoff",
                    "base": "w",
                    "energies": {f"a.{'9' * 5000}.b": 0.5},
                    "took": 1,
                }
            )
        ),
    ],
    ids=["epsilon", "macro-f1", "partitioner", "layer"],
)
def test_what_a_run_lacks_or_another_version_writes_has_a_report(
    tmp_path: Path, change: Change
) -> None:
    path = write_run(tmp_path / "run")
    change(path)
    pages(path)


# Runs that go on


class MeddlingGrid(RecordingGrid):
    """A grid that changes the run directory before round 3."""

    def __init__(self, config: Config, change: Change) -> None:
        super().__init__(config)
        self._path, self._change = Path(str(config["run.dir"])), change

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3:
            self._change(self._path)


def copy(name: str) -> Change:
    return lambda path: shutil.copy(
        checkpoint_path(path, 1), path / "checkpoints" / name
    )


@pytest.mark.parametrize(
    "change",
    [
        copy("round-0001 (copy).safetensors"),
        copy("round-0001-backup.safetensors"),
        lambda path: (path / "checkpoints" / "round-0000.safetensors").mkdir(),
    ],
    ids=["copy", "backup", "folder"],
)
def test_a_stray_file_among_checkpoints_ends_neither_run_nor_resuming(
    config: Config, change: Change
) -> None:
    config |= {"rounds": 4}
    path = start(config, MeddlingGrid(config, change))
    assert len(list((path / "checkpoints").glob("round-*"))) > len(
        list_checkpoints(path)
    )
    start(resumed(config), Grid(config))


def test_a_ledger_that_is_deleted_in_mid_run_is_written_anew(
    config: Config,
) -> None:
    other = elsewhere(config)
    whole = start(other, Grid(other))
    grid = MeddlingGrid(config, lambda path: (path / "ledger.csv").unlink())
    path = start(config, grid)
    assert payloads(path) == payloads(whole)
    assert slora("report", path).exit_code == 0
    start(resumed(config), Grid(config))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: (path / "ledger.csv").unlink(), r"ledger\.csv has 0 bytes, not"),
        (
            lambda path: (path / "ledger.csv").write_text("1,lora,up,6,8,9\r\n" * 50),
            r"ledger\.csv: line 1: it is not the header",
        ),
    ],
    ids=["missing", "headerless"],
)
def test_resuming_without_a_whole_ledger_says_what_is_wrong(
    config: Config, change: Change, told: str
) -> None:
    change(stop(config, 2))
    match = rf"which holds no whole checkpoint; .*round-0001\.safetensors: {told}"
    with pytest.raises(ConfigError, match=match):
        run(Grid(config), resumed(config), 1)


def test_a_run_is_resumed_and_reported_through_a_link(
    config: Config, tmp_path: Path
) -> None:
    other = elsewhere(config)
    whole = start(other, Grid(other))
    path, link = stop(config, 2), tmp_path / "link"
    link.symlink_to(path)
    go_on(config | {"run.dir": str(link)})
    assert_same(path, whole)
    assert slora("report", link).exit_code == 0
    assert (path / "report.html").is_file()
