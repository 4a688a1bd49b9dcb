"""Run configs that try to make a node run code or hand out what is on its disk."""

import json
import pickle
from pathlib import Path

import pytest

from slora_flwr.backbone.load import load_backbone
from slora_flwr.config import ConfigError, DataConfig, ModelConfig, Value, parse
from slora_flwr.data.texts import load_texts


class Marks:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("prefix", ["", "hf://datasets/"])
def test_a_loader_of_pickles_is_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "executed"
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Marks(marker)))
    name = f"{prefix}pandas"
    with pytest.raises(ConfigError, match=f"data.name is '{name}'; allowed: "):
        load_texts(DataConfig(name=name))
    assert not marker.exists()


def test_no_module_of_the_library_is_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import packaged_modules

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    loaders = packaged_modules._PACKAGED_DATASETS_MODULES
    assert {"csv", "json", "pandas", "text", "webdataset"} < loaders.keys()
    for name in loaders:
        with pytest.raises(ConfigError, match=f"data.name is '{name}'; allowed: "):
            load_texts(DataConfig(name=name))


def test_a_models_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[object] = []

    def answer(question: object = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    marker = tmp_path / "executed"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PretrainedConfig\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own'\n"
    )
    described = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"model\.name is "):
        load_backbone(ModelConfig(name=str(folder)), 2, 0)
    assert (questions, marker.exists()) == ([], False)


@pytest.mark.parametrize(
    ("key", "most", "others"),
    [
        ("rounds", 10**6, {}),
        ("clients.count", 10**7, {}),
        ("train.epochs", 1000, {}),
        ("sparse.epochs", 1000, {}),
        ("lora.epochs", 1000, {}),
        ("bottleneck.epochs", 1000, {"method": "houlsby"}),
    ],
)
def test_work_without_end_is_refused(
    key: str, most: int, others: dict[str, Value]
) -> None:
    parse({key: most, **others})
    for given in (most + 1, 2 * 10**9):
        allowed = rf"{key} is {given}; allowed: a number from [01] up to {most}"
        with pytest.raises(ConfigError, match=allowed):
            parse({key: given, **others})
