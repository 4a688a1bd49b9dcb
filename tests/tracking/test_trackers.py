"""What trackers hold of whole runs, read back from their stores."""

import json
import os
import shutil
import subprocess
import sys
from logging import WARNING
from pathlib import Path
from typing import Any

import pytest

import slora_embedded
import slora_flwr
from slora_flwr.config import ConfigError, flatten, parse
from slora_flwr.config.sections import TRACKERS as NAMES
from slora_flwr.tracking.choice import TRACKERS
from slora_flwr.wire.messages import Instruction
from tests.support.grids import Grid
from tests.support.resuming import go_on, resumed, stop
from tests.support.runs import Config, differ, elsewhere, events, final, ledger, start
from tests.tracking.stores import READERS, Rounds, Stored


@pytest.fixture
def config(config: Config) -> Config:
    return config | {"method": "slora", "rounds": 4, "clients.per-round": 4}


@pytest.fixture(params=NAMES)
def tracker(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason="an extra that is not installed")
    return str(request.param)


def read(tracker: str, directory: Path) -> Stored:
    found = READERS[tracker](directory)
    # The names of files alone: MLflow lists folders too.
    found.files = {name for name in found.files if "." in name}
    return found


def expected(directory: Path) -> Rounds:
    """Return the figures of each round, from the run's own files."""
    found: Rounds = {}
    own = ("loss", "accuracy", "macro_f1", "majority_accuracy")
    for done in events(directory, "round"):
        figures = {
            "phase": 1.0 if done["phase"] == "sparse" else 2.0,
            "train/loss": done["train_loss"],
            "clients/asked": len(done["cohort"]),
            "clients/replied": len(done["clients"]),
            "seconds": done["seconds"],
        }
        figures |= {f"eval/{name}": done[name] for name in own if name in done}
        if "kept_energy" in done:
            figures["kept_energy"] = done["kept_energy"]
        for name, column in (("bytes", "payload"), ("messages", "message")):
            for way in ("up", "down"):
                figures[f"{name}/{way}"] = sum(
                    int(row[f"{column}_bytes"])
                    for row in ledger(directory)
                    if row["direction"] == way and int(row["round"]) <= done["round"]
                )
        found[done["round"]] = figures
    return found


def assert_holds(found: Rounds, wanted: Rounds) -> None:
    assert found.keys() == wanted.keys()
    for number, figures in wanted.items():
        # TensorBoard has 32 bits.
        assert found[number] == pytest.approx(figures, rel=1e-6)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= WARNING]
    return [told for told in found if told.startswith(("track", "run.metrics-port"))]


def test_the_names_are_those_of_the_config() -> None:
    assert tuple(TRACKERS) == NAMES == tuple(READERS)
    assert parse({"track": "wandb, mlflow"}).trackers == ["wandb", "mlflow"]
    assert parse({}).trackers == []


def test_a_store_holds_config_figures_and_results(
    config: Config, tracker: str, caplog: pytest.LogCaptureFixture, dialled: list[Any]
) -> None:
    config |= {"track": tracker}
    directory = start(config, Grid(config, 2))
    found = read(tracker, directory)
    given = {key: str(value) for key, value in flatten(parse(config)).items()}
    del given["run.dir"], given["run.resume"]
    assert found.config == given
    assert_holds(found.rounds, expected(directory))
    exported = {f"adapter/{path.name}" for path in (directory / "adapter").iterdir()}
    files = {"config.toml", "resolved.toml", "summary.json", "report.html", *exported}
    assert found.files == ({"summary.json"} if tracker == "tensorboard" else files)
    assert found.status in {"", "FINISHED", "0"}
    assert (warnings(caplog), dialled) == ([], [])
    assert (directory / "tracking").stat().st_mode & 0o077 == 0


def test_a_resumed_run_goes_on_in_the_same_run(config: Config, tracker: str) -> None:
    config |= {"track": tracker}
    directory = stop(config, 3)
    kept = directory / "tracking" / "trackers.json"
    first = json.loads(kept.read_text())[tracker]
    assert first["round"] == 2
    assert_holds(read(tracker, directory).rounds, expected(directory))
    go_on(config)
    found = read(tracker, directory)
    assert json.loads(kept.read_text())[tracker] == {"id": first["id"], "round": 4}
    assert [*found.rounds] == [1, 2, 3, 4]
    assert_holds(found.rounds, expected(directory))


def test_a_run_that_goes_further_back_doubles_no_round(
    config: Config, tracker: str
) -> None:
    config |= {"track": tracker, "run.keep": 9}
    directory = start(config, Grid(config, 2))
    before = read(tracker, directory).rounds
    again = str(directory / "checkpoints" / "round-0002.safetensors")
    start(config | {"run.resume": again}, Grid(config, 2))
    after = read(tracker, directory).rounds
    assert [*after] == [1, 2, 3, 4]
    # Seconds tell which of the two it is that a tracker has.
    seconds = [figures["seconds"] for figures in after.values()]
    held = expected(directory) if tracker == "tensorboard" else before
    wanted = [figures["seconds"] for figures in held.values()]
    assert seconds == pytest.approx(wanted, rel=1e-6)


def test_a_tracker_that_comes_later_gets_the_earlier_rounds(config: Config) -> None:
    pytest.importorskip("mlflow", reason="an extra that is not installed")
    directory = stop(config, 3)
    assert not (directory / "tracking").exists()
    start(resumed(config) | {"track": "mlflow"}, Grid(config, 2))
    assert_holds(read("mlflow", directory).rounds, expected(directory))


def test_all_trackers_together_change_nothing_of_a_run(config: Config) -> None:
    for name in NAMES:
        pytest.importorskip(name, reason="an extra that is not installed")
    alone = start(config, Grid(config, 2))
    config = elsewhere(config, track=",".join(NAMES))
    followed = start(config, Grid(config, 2))
    for name in ("last", "averaged", "best"):
        assert not differ(final(alone, name), final(followed, name))
    weights = [*(alone / "adapter").glob("*.safetensors")]
    assert weights
    for path in weights:
        assert path.read_bytes() == (followed / "adapter" / path.name).read_bytes()


def test_a_server_that_is_away_is_one_warning(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="an extra that is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    alone = start(config, Grid(config, 2))
    config = elsewhere(config, track="mlflow,tensorboard")
    followed = start(config, Grid(config, 2))
    (told,) = warnings(caplog)
    assert told.startswith("track: mlflow failed and is left out for the rest")
    assert not differ(final(alone), final(followed))
    assert_holds(read("tensorboard", followed).rounds, expected(followed))


class SpoilingGrid(Grid):
    """A grid that spoils MLflow's file in round 3."""

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3:
            run = Path(str(self._contexts[1].run_config["run.dir"]))
            (run / "tracking/mlflow/mlflow.db").write_bytes(b"spoilt" * 100_000)


def test_a_tracker_that_fails_in_mid_run_is_one_warning(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="an extra that is not installed")
    alone = start(config, Grid(config, 2))
    config = elsewhere(config, track="mlflow,tensorboard")
    followed = start(config, SpoilingGrid(config, 2))
    (told,) = warnings(caplog)
    assert told.startswith("track: mlflow failed and is left out for the rest")
    kept = json.loads((followed / "tracking" / "trackers.json").read_text())
    assert (kept["mlflow"]["round"], kept["tensorboard"]["round"]) == (2, 4)
    assert not differ(final(alone), final(followed))


def test_a_run_that_fails_is_one_that_failed(config: Config) -> None:
    pytest.importorskip("mlflow", reason="an extra that is not installed")
    directory = stop(config | {"track": "mlflow"}, 3)
    found = read("mlflow", directory)
    assert found.status == "FAILED"
    assert found.files == {"config.toml", "resolved.toml"}


@pytest.mark.parametrize("tracker", NAMES)
def test_a_library_that_is_missing_is_told_before_any_message(
    config: Config, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    config |= {"track": tracker}
    # As if it were not there.
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, f"slora_flwr.tracking.{tracker}", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    grid = Grid(config)
    with pytest.raises(ConfigError) as caught:
        start(config, grid)
    assert str(caught.value).startswith(f"track is '{tracker}', and {tracker} cannot")
    assert f"pip install 'slora-flwr[{tracker}]'" in str(caught.value)
    assert grid.queried == []
    assert not Path(str(config["run.dir"])).exists()


class WatchingGrid(Grid):
    """A grid that notes what there is of trackers while the run goes on."""

    def before(self, asked: Instruction) -> None:
        run = Path(str(self._contexts[1].run_config["run.dir"]))
        self.seen = [*self.seen, (run / "tracking").exists()]

    seen: list[bool] = []  # noqa: RUF012


def test_an_app_bundle_of_code_alone_has_the_page(tmp_path: Path) -> None:
    """Else every tracker would be left out at the end of a run over Flower."""
    package = Path(slora_flwr.__file__).parent
    for path in package.rglob("*.py"):
        copy = tmp_path / "slora_flwr" / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (tmp_path / "slora_embedded").symlink_to(Path(slora_embedded.__file__).parent)
    code = "import slora_flwr; from slora_flwr.reports.page import Page, render; "
    code += "print(slora_flwr.__file__, render(Page('A run', '', [])))"
    told = subprocess.check_output(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        cwd=tmp_path,
    )
    assert told.startswith(f"{tmp_path}/slora_flwr/__init__.py <!DOCTYPE html>")
    assert "<title>A run</title>" in told


PRIVATE: Config = {
    "privacy.noise-multiplier": 1.0,
    "privacy.clip-norm": 0.5,
    "privacy.delta": 0.01,
    "train.batch-size": 8,
}


@pytest.mark.parametrize("unit", ["client", "example"])
def test_with_privacy_only_what_is_released_is_handed_over_at_the_end(
    config: Config, tracker: str, unit: str
) -> None:
    config |= PRIVATE | {"track": tracker, "privacy.unit": unit}
    grid = WatchingGrid(config, 2)
    directory = start(config, grid)
    assert grid.seen
    assert not any(grid.seen)
    found = read(tracker, directory)
    allowed = {"phase", "epsilon", "kept_energy"}
    allowed |= {f"eval/{n}" for n in ("loss", "accuracy", "macro_f1")}
    allowed |= {"eval/majority_accuracy"}
    assert [*found.rounds] == [1, 2, 3, 4]
    for number, figures in found.rounds.items():
        assert {"phase", "epsilon", "eval/accuracy"} <= figures.keys() <= allowed
        done = events(directory, "round")[number - 1]
        assert figures["epsilon"] == pytest.approx(done["epsilon"], rel=1e-6)
    assert not found.files & {"summary.json", "report.html"}
