"""The folder of an app that imports the installed package."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import flatten_dict
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import ConfigError, parse
from slora_flwr.engines.app_folder import app_folder, is_app, write_app

ROOT = Path(__file__).parents[2]


def project_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def config_of(folder: Path) -> dict[str, Any]:
    return flatten_dict(project_of(folder)["tool"]["flwr"]["app"]["config"])


def test_a_new_app_passes_flowers_checks(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_app(folder, {"method": "lora", "clients.alpha": 0.5})
    config, warnings = load_and_validate(folder / "pyproject.toml")
    assert not warnings
    # Those of `flwr app publish`, which asks for a login before it makes them.
    publish = importlib.import_module("flwr.cli.app_cmd.publish")
    publish._validate_app_name(folder.name, "name")
    publish._validate_description(config["project"]["description"])
    files = publish._collect_file_paths(folder)
    publish._validate_files(files)
    assert {path.name for path in files} == {path.name for path in folder.iterdir()}
    assert all(path.stat().st_size < 12_000 for path in files)
    assert len((folder / "README.md").read_text().splitlines()) <= 80
    with pytest.raises(click.ClickException):
        publish._validate_app_name("no app", "name")


def test_its_code_is_that_of_a_checkout(tmp_path: Path) -> None:
    write_app(tmp_path / "demo", {})
    for name in ("server_app.py", "client_app.py", "LICENSE"):
        assert (tmp_path / "demo" / name).read_text() == (ROOT / name).read_text()


def test_its_config_is_that_of_a_checkout_but_for_what_is_given(tmp_path: Path) -> None:
    write_app(tmp_path / "demo", {"rounds": 30, "data.name": 'a "b"'})
    config = config_of(tmp_path / "demo")
    assert config == config_of(ROOT) | {"rounds": 30, "data.name": 'a "b"'}
    assert parse(config).sparse.rounds == 10  # a third


def test_flower_installs_nothing_for_a_run_and_pip_everything(tmp_path: Path) -> None:
    write_app(tmp_path / "demo", {})
    project = project_of(tmp_path / "demo")
    (told,) = project["tool"]["uv"]["dependency-metadata"]
    assert told == {"name": "demo", "version": "0", "requires-dist": []}
    needs = project["project"]["dependencies"]
    assert [need.split("~=")[0].split("[")[0] for need in needs] == [
        "flwr",
        "slora-flwr",
    ]
    bundle = build_fab_from_disk(tmp_path / "demo")
    assert b"uv.toml" not in bundle
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    wheel += ["--wheel-dir", str(tmp_path), str(tmp_path / "demo")]
    subprocess.run(wheel, check=True)
    assert [path.name.split("-")[0] for path in tmp_path.glob("*.whl")] == ["demo"]


@pytest.mark.parametrize(
    ("folder", "options", "told"),
    [
        ("two_words", (), "name is 'two_words'; allowed: 1 to 32 letters"),
        ("a" * 33, (), "allowed: 1 to 32 letters"),
        ("demo", ("--publisher", "9"), "publisher is '9'; allowed: 1 to 32 letters"),
        ("full", (), "allowed: a new or empty folder"),
        ("demo", ("-c", "method=loar"), "method is 'loar'; allowed:"),
    ],
)
def test_what_no_app_can_be_is_refused(
    tmp_path: Path, folder: str, options: tuple[str, ...], told: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    done = CliRunner().invoke(app, ["new", str(tmp_path / folder), *options])
    assert done.exit_code == 2
    assert told in done.output
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_without_an_app_here_the_installed_one_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\n")
    with app_folder(None) as made:
        assert is_app(made)
        assert made.absolute() != tmp_path
    assert not made.exists()
    write_app(tmp_path / "demo", {})
    with app_folder(tmp_path / "demo") as given:
        assert given == tmp_path / "demo"
    monkeypatch.chdir(tmp_path / "demo")
    with app_folder(None) as here:
        assert here.absolute() == tmp_path / "demo"


def test_a_folder_that_is_no_app_is_refused(tmp_path: Path) -> None:
    from slora_flwr.engines.flower import run_flower

    with pytest.raises(ConfigError, match="holds no Flower app; allowed: a folder of"):
        run_flower(tmp_path, {})
