"""What the commands print on a terminal of 80 columns."""

import tomllib
from pathlib import Path

import pytest
import tomli_w
from rich.cells import cell_len

from slora_flwr.cli import COMMANDS, NODE_COMMANDS
from tests.support.runs import Config, make_config
from tests.support.terminal import COLUMNS, slora_on_terminal

# Where a table may not have cut a figure: before, in or after it.
CUT = ("…", "...")


def show(*arguments: object) -> list[str]:
    """Return the lines of a command that completes and whose tables fit."""
    status, lines = slora_on_terminal(*arguments)
    assert status == 0, "\n".join(lines)
    for line in lines:
        if set(line) & set("│┃━─┏└╭╰"):
            assert cell_len(line) <= COLUMNS, line
            assert not any(mark in line for mark in CUT), line
    return lines


def cells(lines: list[str]) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in lines
        if line.startswith("│")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("terminal")


@pytest.fixture(scope="module")
def home(place: Path) -> Path:
    return place / "home"


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_HOME", str(home))


@pytest.fixture(scope="module")
def written(place: Path, corpus: Path, tiny_models: dict[str, Path]) -> Path:
    """A config of one round, one client and one epoch, without a run directory."""
    config = make_config(corpus, tiny_models["bert"], place)
    del config["run.dir"]
    changes: Config = {"rounds": 1, "clients.count": 1, "clients.per-round": 1}
    path = place / "run.toml"
    path.write_text(tomli_w.dumps(config | changes))
    return path


NESTED = ["node", *(f"node {name}" for name in NODE_COMMANDS)]


@pytest.mark.parametrize("command", ["", *COMMANDS, *NESTED])
def test_help_fits(command: str) -> None:
    status, lines = slora_on_terminal(*command.split(), "--help")
    assert status == 0
    assert max(map(cell_len, lines)) <= COLUMNS


def test_a_plan_shows_every_figure_in_whole(written: Path) -> None:
    many = "clients.count=20 clients.per-round=20 rounds=5000 method=slora"
    lines = show("plan", "-c", written, *many.split(), "sparse.rounds=1")
    rows = cells(lines)
    heads = {row[0] for row in rows}
    assert heads == {"sparse phase", "lora phase", "fft", "lora"}
    # By hand: what 20 clients of FFT send in 5,000 rounds, in MB.
    [values] = {row[2] for row in rows if row[0] == "fft" and row[3] == "100.00%"}
    sent = 4 * int(values.replace(",", "")) * 20 * 5_000 / 1e6
    assert [row[-1] for row in rows if row[0] == "fft"][1] == f"{sent:,.2f}"


def test_a_run_of_one_of_each_and_what_is_made_of_it(
    written: Path, place: Path, home: Path
) -> None:
    lines = show("run", "--engine", "inline", "-c", written)
    text = "\n".join(lines)
    assert "1 node hosts 1 client\n" in text
    assert "lora: 1 round of 1 client, 1 epoch of adamw" in text
    # The live table's closed round stays; its line is not printed beside it.
    [row] = [line.split() for line in lines if line.split()[:2] == ["1/1", "lora"]][-1:]
    assert row[2] == "1/1"
    assert row[-2:] == ["0:00", "0"]
    assert not any("0:00 left" in line for line in lines)
    assert [row[0] for row in cells(lines)] == [
        "lora phase",
        "lora",
        "fft, same rounds",
        "lora, same rounds",
    ]
    [listed] = [line for line in show("runs") if "finished" in line]
    assert cell_len(listed) <= COLUMNS
    [path] = (home / "runs").iterdir()
    out = place / "comparison"
    for command in (
        ("report",),
        ("compare", path, "--out", out),
        ("export", "--to", place / "export"),
        ("predict", "w4 w5"),
    ):
        shown = [line for line in show(*command) if line]
        assert len("".join(shown)) < 300, shown


def test_a_sweep_shows_every_figure_in_whole(written: Path, place: Path) -> None:
    """With two keys and spreads its table is wider than the terminal."""
    grid = {"method": ["lora", "alternate-lora"], "lora.rank": [2, 4], "seed": [0, 1]}
    base = tomllib.loads(written.read_text())
    study = {"sweep": {"processes": 1}, "base": base, "grid": grid}
    path = place / "few.toml"
    path.write_text(tomli_w.dumps(study))
    lines = show("sweep", path, "--out", place / "sweep")
    figures: dict[tuple[str, str], list[str]] = {}
    for method, rank, *more in cells(lines):
        figures.setdefault((method, rank), []).extend(more)
    assert figures.keys() == {
        (method, rank) for method in ("lora", "alternate-lora") for rank in ("2", "4")
    }
    for runs, *others, seconds in figures.values():
        assert runs == "2"
        assert len(others) == 6
        assert sum("±" in figure for figure in others) == 4
        assert seconds.isdigit()
