"""What tests share: a quiet environment, tiny models, texts and a config."""

import csv
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# In processes that tests start too: the last bits of a sum depend on the threads.
os.environ["OMP_NUM_THREADS"] = "1"
# No test is of another precision on another processor: `auto` is float32 here.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
# Simulations start a Ray of their own, whatever cluster another test has.
os.environ["RAY_ADDRESS"] = "local"
os.environ["SLORA_HOME"] = tempfile.mkdtemp(prefix="slora-tests-")

import pytest
import torch
from hypothesis import HealthCheck, settings

from slora_flwr.backbone.load import Backbone
from slora_flwr.client.process import make_process
from slora_flwr.data.examples import Examples
from slora_flwr.server import collect, fleet
from tests.support.causal import causal_keys, save_language_model, write_dialogues
from tests.support.clock import Clock
from tests.support.runs import Config, make_config
from tests.support.tiny import (
    CLASSES,
    FAMILIES,
    SPECIAL,
    VOCAB,
    load_tiny,
    make_body,
    make_examples,
    save_checkpoint,
)

torch.set_num_threads(1)
# However busy the machine is.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["SLORA_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny checkpoints without a head, by family."""
    folders = {}
    for family in FAMILIES:
        torch.manual_seed(11)
        folder = tmp_path_factory.mktemp(family)
        folders[family] = save_checkpoint(make_body(family), folder)
    return folders


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of the words of a class and, nearly as many, of any words."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(len(SPECIAL), VOCAB)]
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(160):
            c = draw.randrange(3)
            own = draw.choices(words[20 * c : 20 * c + 20], k=5)
            rows.writerow([" ".join(own + draw.choices(words, k=4)), CLASSES[c]])
    return path


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The keys of a tiny Llama that learns responses to prompts."""
    torch.manual_seed(12)
    folder = tmp_path_factory.mktemp("causal")
    model = save_language_model("llama", folder / "model")
    return causal_keys(model, write_dialogues(folder / "dialogues.csv"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[family]


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    """A tiny backbone of each family, with W_0 resident."""
    return load_tiny(folder)


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    """Three rounds of LoRA by six clients of a tiny BERT."""
    return make_config(corpus, tiny_models["bert"], tmp_path / "run")


@pytest.fixture
def two_phases(config: Config) -> Config:
    return config | {"method": "slora", "rounds": 4, "sparse.rounds": 1}


@pytest.fixture
def examples() -> Examples:
    return make_examples()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real data sets and models, which a checkout need not have."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("SLORA_ASSETS") or beside)
    if not (folder / "models").is_dir():
        pytest.skip(f"no models below {folder}; set SLORA_ASSETS")
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that passes as the server's collection of replies and nodes waits."""
    clock = Clock()
    monkeypatch.setattr(fleet, "time", clock)
    monkeypatch.setattr(collect, "time", clock)
    return clock


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders of this test's own, and a process that has loaded nothing."""
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLORA_ASSETS", raising=False)
    make_process.cache_clear()
    yield
    make_process.cache_clear()
