"""The wheel alone: no checkout, an environment with nothing of it but the wheel."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.simulation import flower_home

ROOT = Path(__file__).parents[2]
SHORT = "rounds=2 sparse.rounds=1 clients.per-round=2 data.max-test=50"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True)
    (path,) = folder.glob("slora_flwr-*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel.

    What the wheel depends on is taken from this environment, after the wheel itself.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    own = sysconfig.get_path("purelib")
    (site / "dependencies.pth").write_text(f"{own}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python")]
    install = ["install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    for theirs in Path(sys.executable).parent.glob("fl*w*r*"):  # Flower's commands
        ours = scripts / theirs.name
        _, _, body = theirs.read_text().partition("\n")
        ours.write_text(f"#!{scripts / 'python'}\n{body}")
        ours.chmod(0o755)
    found = subprocess.run(
        [scripts / "python", "-c", "import slora_flwr; print(slora_flwr.__file__)"],
        cwd=folder,  # which comes before what is installed
        env=_without_paths(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    return scripts


@pytest.fixture(scope="module")
def flower(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """An environment with its own SuperLink, and the wheel's commands alone."""
    with flower_home(tmp_path_factory.mktemp("flower")) as environment:
        paths = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        yield {k: v for k, v in environment.items() if k != "PYTHONPATH"} | paths


def _without_paths() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def test_the_wheel_holds_the_package_and_its_models_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sizes = sum(file.file_size for file in archive.infolist())
    for package in ("slora_flwr", "slora_embedded"):
        tracked = subprocess.run(
            ["git", "ls-files", package],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert names >= {*tracked.stdout.split()}
    others = {name.split("/")[0] for name in names} - {"slora_flwr", "slora_embedded"}
    assert [Path(name).suffix for name in others] == [".dist-info"]
    assert sizes < 15e6


@pytest.mark.sockets
def test_a_new_app_runs(scripts: Path, flower: dict[str, str], tmp_path: Path) -> None:
    new = [str(scripts / "slora"), "new", "demo", "-c", *SHORT.split()]
    subprocess.run(new, cwd=tmp_path, env=flower, check=True)
    command = [str(scripts / "flwr"), "run", "demo", "--stream"]
    run = subprocess.run(
        [*command, "-c", f'run.dir="{tmp_path}/run"'],
        cwd=tmp_path,
        env=flower,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "fft, same rounds" in run.stdout, run.stdout + run.stderr
    assert "No additional application dependencies needed" in run.stdout
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["rounds"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.sockets
def test_slora_run_needs_no_app(
    scripts: Path, flower: dict[str, str], tmp_path: Path
) -> None:
    given = f'{SHORT} run.dir="{tmp_path}/run"'
    done = subprocess.run(
        [scripts / "slora", "run", "-c", given],
        cwd=tmp_path,
        env=flower,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = subprocess.run(
        [scripts / "slora", "report", str(tmp_path / "run")],
        cwd=tmp_path,
        env=flower,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(report.stdout.strip()).is_file()
