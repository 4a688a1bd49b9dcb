"""What a run writes is for its user alone, whatever the umask."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slora_flwr.common.files import append, make_folder
from tests.support.grids import Grid
from tests.support.resuming import go_on, stop
from tests.support.runs import INT8, SLORA, TOP, Config, make_config, start

ROOT = Path(__file__).parents[2]
# Passing them would do for others to open a file whose own mode lets them.
PASS, ANY = 0o011, 0o077


@pytest.fixture(autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is masked, unless a test asks for another."""
    before = os.umask(getattr(request, "param", 0o000))
    yield
    os.umask(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "above" / "home"
    monkeypatch.setenv("SLORA_HOME", str(path))
    return path


@pytest.fixture
def config(
    corpus: Path, tiny_models: dict[str, Path], home: Path, tmp_path: Path
) -> Config:
    config = make_config(corpus, tiny_models["bert"], tmp_path / "new" / "run")
    return config | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


def mode(path: Path) -> int:
    return path.stat().st_mode & ANY


def within(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def in_reach(folder: Path) -> list[Path]:
    """List the files that others could open if they got as far as a folder."""
    found = []
    for path in folder.iterdir():
        if not path.is_dir():
            found += [path] if mode(path) else []
        elif mode(path) & PASS:
            found += in_reach(path)
    return found


def test_a_run_and_its_caches(config: Config, home: Path, tmp_path: Path) -> None:
    """Interrupted, so that residuals are there, and resumed."""
    config |= SLORA | INT8 | TOP
    directory = stop(config, 4)
    cache = home / "cache"
    for pattern in ("tokens-*", "run-*/base-*", "run-*/*/3"):
        assert list(cache.glob(pattern)), pattern
    residuals = [path for path in cache.glob("run-*/**/*") if path.is_file()]
    for path in (*residuals, *within(directory)):
        assert not mode(path), path
    go_on(config)
    names = {path.relative_to(directory).as_posix() for path in within(directory)}
    assert {
        "config.toml",
        "resolved.toml",
        "events.jsonl",
        "ledger.csv",
        "summary.json",
        "checkpoints/last.safetensors",
        "checkpoints/round-0004.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_over_patch.safetensors",
        "adapter/base_patch.safetensors",
        "adapter/classes.json",
        "adapter/tokenizer.json",
        "adapter/README.md",
    } <= names
    for path in within(directory):
        assert not mode(path), path
    assert not mode(directory.parent)
    assert not mode(home)
    assert not in_reach(tmp_path)


def test_a_whole_model(config: Config) -> None:
    config |= {"method": "houlsby", "rounds": 1}
    directory = start(config, Grid(config))
    names = {path.name for path in (directory / "model").iterdir()}
    assert {"tokenizer.json", "bottlenecks.safetensors", "README.md"} <= names
    for path in within(directory):
        assert not mode(path), path


@pytest.mark.parametrize("umask", [0o000, 0o022], indirect=True, ids="{:03o}".format)
def test_a_run_in_its_usual_place(config: Config, home: Path) -> None:
    config |= {"run.dir": "", "rounds": 1}
    start(config, Grid(config))
    [directory] = (home / "runs").iterdir()
    for path in (home, *within(home / "runs")):
        assert not mode(path), path
    assert (directory / "adapter").is_dir()


def test_a_folder_that_is_there_stays_as_it_is(config: Config) -> None:
    directory = Path(str(config["run.dir"]))
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    config |= {"rounds": 1}
    start(config, Grid(config))
    assert mode(directory) == 0o055
    for path in within(directory)[1:]:
        assert not mode(path), path


def test_files_that_are_made_by_appending(home: Path) -> None:
    make_folder(home)
    append(home / "a", "one\n")
    append(home / "a", "two\n")
    assert (home / "a").read_text() == "one\ntwo\n"
    assert not mode(home / "a")


def test_the_keys_of_a_deployment(tmp_path: Path) -> None:
    """Files of keys, and neither git nor the image takes them."""
    if os.getuid() != 0:
        pytest.skip("without root it takes a Docker engine to give files away")
    environment = {
        **os.environ,
        "SLORA_CERTS": str(tmp_path / "certs"),
        "SLORA_NODES": str(tmp_path / "nodes"),
    }
    for arguments in (["ca"], ["server", "fl.example.org"], ["node", "a"]):
        subprocess.run(
            [ROOT / "docker" / "certs.sh", *arguments], env=environment, check=True
        )
    public = {"ca.crt", "server.crt", "key.pub"}
    files = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert {*files} == public | {"ca.key", "superexec", "server.key", "key"}
    for name, path in files.items():
        assert name in public or not mode(path), path
    ignored = ["certs/ca.key", "certs/superexec", "nodes/a/key", "server.env"]
    known = (ROOT / "docker" / ".gitignore").read_text().split()
    for secret in ignored:
        assert any(Path(secret).match(p) or secret.startswith(p) for p in known), secret
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[1] == "*"
    shipped = ("gate.py", "health.py", "supernode.sh", "flower.toml")
    of_docker = [line for line in sent if "docker" in line and line.startswith("!")]
    assert of_docker == [f"!docker/{name}" for name in shipped]
    assert not [line for line in sent if line.strip("!/*.") == "" and "!" in line]
