"""A method from a package outside, which entry points name and nothing here knows."""

import configparser
import importlib
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from slora_flwr.adapters import HeadAdapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import parse
from slora_flwr.config.methods import Method, PhaseRow
from slora_flwr.config.schedule import make_schedule
from tests.support.forks import Forks
from tests.support.resuming import assert_same, resumed
from tests.support.runs import (
    CLIENTS,
    HEAD_VALUES,
    Config,
    arguments,
    elsewhere,
    final,
    ledger,
)
from tests.support.tiny import CLASSES, load_tiny, logits, make_examples

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"
ENTRY_POINTS = """\
[slora_flwr.adapters]
ia3 = slora_ia3:IA3Adapter
[slora_flwr.aggregators]
fedexp = slora_ia3:FedExP
[slora_flwr.methods]
ia3 = slora_ia3:METHOD
"""
# By hand, of the tiny BERT: in each of two layers four matrices of 32 x 32, one of
# 48 x 32, whose output is scaled, and one of 32 x 48, whose input is.
VECTOR_VALUES = 2 * (4 * 32 + 48 + 48)

# `slora plan` and `slora run` with the same options, in one process: imports take
# longer than both.
PLAN_AND_RUN = """
import sys
from slora_flwr.cli import app

app(["plan", *sys.argv[-2:]], standalone_mode=False)
app(sys.argv[1:], standalone_mode=False)
"""
RUN = "from slora_flwr.cli import app; app()"
# As `slora run --engine inline` does, with three nodes; it dies in the third round.
DIE = """
import os, signal, sys
from flwr.common.config import parse_config_args
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run

class Grid(InlineGrid):
    def _answer(self, message):
        if message.metadata.group_id == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._answer(message)

config = parse_config_args(sys.argv[-1:])
run(Grid(config, nodes=3), config, 1)
"""
# What each command does first.
READ = """
import sys
from flwr.common.config import parse_config_args
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.schedule import make_schedule, outside_files

try:
    config = parse(parse_config_args(sys.argv[1:]))
    make_schedule(config)
except ConfigError as error:
    sys.exit(f"Error: {error}")
print(len(outside_files(config)))
"""


def install(site: Path, package: str, entry_points: str) -> None:
    """Leave behind what an installer does, but for the code."""
    info = site / f"{package.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(entry_points)


# Runs Python in a process that finds what is installed in a folder.
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks.call
    forks.close()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages, of which the example is one."""
    site = tmp_path / "site"
    install(site, "slora-ia3", ENTRY_POINTS)
    shutil.copy(EXAMPLE / "slora_ia3.py", site)
    return site


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module("slora_ia3")


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return load_tiny(tiny_models["bert"])


def test_it_plans_trains_resumes_and_exports(
    site: Path, call: Call, config: Config, example: ModuleType, bert: Backbone
) -> None:
    config |= {"method": "ia3"}
    values = VECTOR_VALUES + HEAD_VALUES
    done = call(site, PLAN_AND_RUN, *arguments(config))
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "ia3 phase" in line)
    assert row.replace(" ", "").split("│")[2:4] == ["3", str(values)]
    whole = Path(str(config["run.dir"]))
    rows = ledger(whole)
    assert len(rows) == 3 * 2
    for sent in rows:
        assert sent["payload_bytes"] == sent["planned_payload_bytes"]
        assert int(sent["payload_bytes"]) == 4 * len(CLIENTS) * values

    # One that is killed goes on, and ends as the whole one did.
    killed = elsewhere(config)
    done = call(site, DIE, *arguments(killed))
    assert done.returncode == -signal.SIGKILL, done.stderr
    module = site / "slora_ia3.py"
    source = module.read_text()
    # Not by other code: a node that has other code is left out by the same digest.
    module.write_text(f"{source}\n# Changed.\n")
    done = call(site, RUN, *arguments(resumed(killed)))
    assert done.returncode == 2
    assert "the directory of another run" in done.stderr
    assert "outside-code is" in done.stderr
    module.write_text(source)
    done = call(site, RUN, *arguments(resumed(killed)))
    assert done.returncode == 0, done.stderr
    assert_same(Path(str(killed["run.dir"])), whole)

    # Stock PEFT computes what the adapter does, which is not what W_0 does.
    examples, state = make_examples(), final(whole, "averaged")
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(config["model.name"]), num_labels=len(CLASSES)
    )
    loaded = logits(PeftModel.from_pretrained(model, whole / "adapter"), examples)
    adapter = example.IA3Adapter.from_config(parse({}))
    adapter.attach(bert)
    ones = {n: t for n, t in adapter.state().items() if n.endswith(".ia3_l")}
    adapter.load({name: state[name] for name in adapter.shapes()})
    assert torch.equal(logits(bert.model, examples), loaded)
    adapter.load({name: (state | ones)[name] for name in adapter.shapes()})
    assert not torch.allclose(logits(bert.model, examples), loaded, atol=1e-3)


def test_its_adapter_leaves_the_backbone_as_it_was(
    example: ModuleType, bert: Backbone
) -> None:
    examples = make_examples()
    before = {name: p.clone() for name, p in bert.model.named_parameters()}
    computed = logits(bert.model, examples)
    adapter = example.IA3Adapter.from_config(parse({}))
    adapter.attach(bert)
    assert torch.equal(logits(bert.model, examples), computed)  # all are one
    assert adapter.known().keys() | bert.head.keys() == adapter.shapes().keys()
    adapter.load({name: tensor + 0.5 for name, tensor in adapter.state().items()})
    assert not torch.allclose(logits(bert.model, examples), computed, atol=1e-3)
    adapter.detach()
    assert torch.equal(logits(bert.model, examples), computed)
    assert before.keys() == {name for name, _ in bert.model.named_parameters()}
    for name, parameter in bert.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad


def test_its_aggregator_by_hand(example: ModuleType) -> None:
    config = parse({"method": "head"})
    [phase] = make_schedule(config)
    aggregator = example.FedExP(phase, config, 0)

    def after(*updates: tuple[list[float], int]) -> list[float]:
        fold = aggregator.make_fold()
        for client, (update, weight) in enumerate(updates):
            fold.add({"x": torch.tensor(update)}, weight, client)
        sent = {"x": torch.tensor([1.0, 1.0])}
        state, change = aggregator.finish(
            fold, sent, lambda update: {"x": sent["x"] + update["x"]}, HeadAdapter()
        )
        assert change is None
        return list(state["x"].tolist())

    # The mean is (0, 2), whose square is 4; the mean of the squares (16 + 2·13) / 3,
    # which is 14: the step is 14 / (2·4) times the mean.
    assert after(([4.0, 0.0], 1), ([-2.0, 3.0], 2)) == [1.0, 4.5]
    # Of clients that agree it would be half the mean, and it is never shorter than it.
    assert after(([1.0, 2.0], 1), ([1.0, 2.0], 1)) == [2.0, 3.0]
    assert after(([0.0, 0.0], 1), ([0.0, 0.0], 1)) == [1.0, 1.0]


def test_its_project_declares_what_is_installed_here() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    installed = configparser.ConfigParser()
    installed.read_string(ENTRY_POINTS)
    found = {group: dict(installed[group]) for group in installed.sections()}
    assert found == project["entry-points"]


ODD = """
from slora_flwr.config.methods import Method, PhaseRow
TWO = Method((PhaseRow("sparse"), PhaseRow("head")), "no phase takes the delta")
OTHER = Method((PhaseRow("ia3"),), "an adapter of another package")
"""


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        pytest.param(
            "[slora_flwr.methods]\nlora = slora_odd:OTHER",
            "entry point 'lora' of slora_flwr.methods, from slora-odd 0.1.0, has the "
            "name of one of slora-flwr's own; allowed: another name",
            id="a method's name is taken",
        ),
        pytest.param(
            "[slora_flwr.adapters]\nlora = slora_odd:OTHER",
            "entry point 'lora' of slora_flwr.adapters, from slora-odd 0.1.0, has the "
            "name of one of slora-flwr's own; allowed: another name",
            id="an adapter's name is taken",
        ),
        pytest.param(
            "[slora_flwr.methods]\nia3 = slora_odd:OTHER",
            "entry point 'ia3' of slora_flwr.methods, from slora-odd 0.1.0, has the "
            "name of entry point 'ia3' of slora_flwr.methods, from slora-ia3 0.1.0; "
            "allowed: one of the two packages, or another name",
            id="two packages",
        ),
        pytest.param(
            "[slora_flwr.methods]\nodd = slora_odd:NOTHING",
            "entry point 'odd' of slora_flwr.methods, from slora-odd 0.1.0, is "
            "'slora_odd:NOTHING'; allowed: a slora_flwr.config.methods:Method "
            "(AttributeError: module 'slora_odd' has no attribute 'NOTHING')",
            id="no such object",
        ),
        pytest.param(
            "[slora_flwr.methods]\nodd = slora_none:METHOD",
            "entry point 'odd' of slora_flwr.methods, from slora-odd 0.1.0, is "
            "'slora_none:METHOD'; allowed: a slora_flwr.config.methods:Method "
            "(ModuleNotFoundError: No module named 'slora_none')",
            id="no such module",
        ),
        pytest.param(
            "[slora_flwr.methods]\nodd = slora_odd:OTHER\n"
            "[slora_flwr.adapters]\nia3 = slora_ia3:FedExP",
            "entry point 'ia3' of slora_flwr.adapters, from slora-odd 0.1.0, is "
            "'slora_ia3:FedExP'; allowed: a subclass of "
            "slora_flwr.adapters.base:Adapter",
            id="an aggregator as an adapter",
        ),
        pytest.param(
            "[slora_flwr.methods]\nodd = slora_odd:OTHER",
            "'ia3' is none of the adapters; known: full, bias, head, sparse, lora, "
            "houlsby, pfeiffer",
            id="a row that names no adapter",
        ),
        pytest.param(
            "[slora_flwr.methods]\nodd = slora_odd:TWO",
            "method is 'odd', whose phase head cannot start from what sparse learned; "
            "allowed: an adapter that takes a delta, such as lora",
            id="a delta that no phase takes",
        ),
    ],
)
def test_an_entry_point_that_cannot_be_used(
    site: Path, call: Call, entry_points: str, message: str
) -> None:
    if "slora-ia3" not in message:
        shutil.rmtree(site / "slora_ia3-0.1.0.dist-info")
    install(site, "slora-odd", entry_points)
    (site / "slora_odd.py").write_text(ODD)
    done = call(site, READ, f"method='{entry_points.split()[1]}'")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"Error: {message}"]


def test_what_is_not_used_is_not_loaded(site: Path, call: Call) -> None:
    install(site, "slora-odd", "[slora_flwr.methods]\nodd = slora_none:METHOD")
    page = (EXAMPLE.parents[1] / "docs" / "add-a-method.md").read_text()
    [documented] = set(re.findall(r'-c "(.+?)"', page))
    files = [call(site, READ, given).stdout for given in ("method='head'", documented)]
    assert files == ["0\n", "1\n"]


@pytest.mark.parametrize(
    "adapters", [(), ("sparse", "sparse"), ("sparse", "lora", "head")]
)
def test_a_method_has_one_phase_or_two_of_different_adapters(
    adapters: tuple[str, ...],
) -> None:
    with pytest.raises(ValueError, match="a method's phases are"):
        Method(tuple(map(PhaseRow, adapters)), "")
