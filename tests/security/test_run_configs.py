"""Run configs that try to make a node run code or hand out what is on its disk."""

import json
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
from datasets.data_files import DataFilesDict, DataFilesList, sanitize_patterns
from safetensors.torch import load_file

from slora_flwr.backbone.load import load_backbone
from slora_flwr.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    Value,
    parse,
)
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.data_sets import check_data_files, load_texts


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


def found(pattern: str, base: str) -> DataFilesDict:
    """Return the files that a README names, as the library looks them up."""
    patterns = sanitize_patterns([{"split": "train", "path": pattern}])
    return DataFilesDict.from_patterns(patterns, base_path=base)


def test_a_data_set_of_the_hub_names_no_file_of_this_machine(tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("text,label\na,x\nb,y\n")
    base = "hf://datasets/somebody/data@0123"
    own = DataFilesList([f"{base}/train.csv", f"{base}/a/b.csv"], [("0", "1")])
    check_data_files("somebody/data", DataFilesDict({"train": own}))
    check_data_files("somebody/data", None)  # as from the library's cache
    allowed = "names the file .*; allowed: data sets of the Hub whose data files"
    local = found(str(secret), base)
    assert local["train"] == [str(secret)]
    for path in (
        f"file://{secret}",
        "https://example.org/train.csv",
        "hf://datasets/another/data@0123/train.csv",
        "hf://datasets/somebody/data-2@0123/train.csv",
        f"zip://train.csv::{secret}",
        f"{base}/train.zip::{secret}",
    ):
        others = DataFilesDict({"test": DataFilesList([path], []), "train": own})
        with pytest.raises(ConfigError, match=allowed):
            check_data_files("somebody/data", others)
    with pytest.raises(ConfigError, match=allowed):
        check_data_files("somebody/data", local)


def test_what_a_data_set_names_is_checked_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a builder as the library makes it of a README that names a path."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.csv"
    secret.write_text("text,label\na,x\nb,y\n")
    builder = datasets.load_dataset_builder(
        "csv", data_files=str(secret), cache_dir=str(tmp_path / "cache")
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    with pytest.raises(ConfigError, match=r"names the file .*/secret\.csv"):
        load_texts(DataConfig(name="somebody/data"))
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


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


def copied(source: Path, target: Path, **described: object) -> Path:
    """Copy a model to a folder, and add to its config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | described))
    return target


@pytest.mark.parametrize(
    "described",
    [
        {"attn_implementation": "somebody/kernel"},
        {"attn_implementation": {"": "somebody/kernel"}},
        {"_attn_implementation": "kernels-community/flash-attn2:x"},
        # An alias for the attribute, which config.json may bring along.
        {"attribute_map": {"a": "_attn_implementation"}, "a": "somebody/kernel"},
        {"attn_implementation": "unheard-of"},
    ],
)
def test_a_models_kernel_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], described: dict[str, object]
) -> None:
    folder = copied(tiny_models["bert"], tmp_path / "model", **described)
    with pytest.raises(ConfigError, match=r"attn_implementation is .*; allowed: none"):
        load_backbone(ModelConfig(name=str(folder)), 2, 0)
    named = {"attn_implementation": "eager"}
    folder = copied(tiny_models["bert"], tmp_path / "plain", **named)
    load_backbone(ModelConfig(name=str(folder)), 2, 0)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("quantization_config", {"quant_method": "torchao", "quant_type": "int4"}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("transformers_weights", "adapter_model.bin"),
        ("transformers_weights", "another.safetensors.index.json"),
    ],
)
def test_a_models_loader_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], key: str, given: object
) -> None:
    folder = copied(tiny_models["bert"], tmp_path / "model", **{key: given})
    with pytest.raises(ConfigError, match=f"whose {key} is .*; allowed: none$"):
        load_backbone(ModelConfig(name=str(folder)), 2, 0)


def test_a_part_of_a_model_may_name_no_kernel(tmp_path: Path) -> None:
    described = {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 1},
        "attn_implementation": {"text_config": "somebody/kernel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="attn_implementation is somebody/kernel"):
        load_backbone(ModelConfig(name=str(tmp_path)), 2, 0, tokenizer=object())


@pytest.mark.parametrize("is_absolute", [False, True])
def test_an_index_leads_out_of_no_folder(
    tmp_path: Path, tiny_models: dict[str, Path], is_absolute: bool
) -> None:
    folder = copied(tiny_models["bert"], tmp_path / "model")
    weights = folder / "model.safetensors"
    names = [*load_file(weights)]
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    (folder / "inside.safetensors").symlink_to(outside)
    index = folder / "model.safetensors.index.json"

    def load(shard: object) -> None:
        shards = {name: str(shard) for name in names}
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        load_backbone(ModelConfig(name=str(folder)), 2, 0)

    load("inside.safetensors")
    with pytest.raises(ConfigError, match=r"index\.json is .*; allowed: names"):
        load(outside if is_absolute else "../outside.safetensors")


def test_an_adapter_leads_to_no_other_model(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """Whether its folder has a config of its own or not."""
    told = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "another")}
    for folder in (copied(tiny_models["bert"], tmp_path / "model"), tmp_path / "bare"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(told))
        with pytest.raises(ConfigError, match=r"model\.name is ") as caught:
            load_backbone(ModelConfig(name=str(folder)), 2, 0, tokenizer=object())
        assert "another" not in str(caught.value)
        assert ("adapter_config.json" in str(caught.value)) == (folder.name == "model")


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


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("train.batch-size", 4096),
        ("sparse.batch-size", 4096),
        ("lora.batch-size", 4096),
        ("data.max-length", 131072),
    ],
)
def test_batches_without_end_are_refused(key: str, most: int) -> None:
    parse({key: most})
    for given in (most + 1, 10**9):
        allowed = rf"{key} is {given}; allowed: a number from [014] up to {most}"
        with pytest.raises(ConfigError, match=allowed):
            parse({key: given})


def test_a_rank_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.ranks is '9999"):
        parse({"method": "lora", "lora.ranks": "9" * 5000})


# Recipes whose update is the gradient of a client's last examples


@pytest.mark.parametrize("key", ["train.prox", "train.weight-decay"])
@pytest.mark.parametrize(
    ("method", "phase", "rates"),
    [
        ("fft", "full", {"train.lr": 0.01}),
        ("fft", "full", {}),
        ("slora", "sparse", {"sparse.lr": 0.5, "lora.lr": 0.001}),
        ("slora", "lora", {"sparse.lr": 0.001, "lora.lr": 0.5}),
        ("houlsby", "houlsby", {"train.lr": 1e-6, "bottleneck.lr": 0.5}),
        ("fft", "full", {"train.lr": 0.001, "train.head-lr": 0.5}),
    ],
)
def test_a_recipe_that_forgets_all_examples_but_the_last_is_refused(
    key: str, method: str, phase: str, rates: dict[str, Value]
) -> None:
    values: dict[str, Value] = {"method": method, **rates}
    named = {p.adapter: p.recipe for p in make_schedule(parse(values))}
    lr = max(named[phase].lr, named[phase].head_lr)
    parse({**values, key: 0.0999 / lr})
    for given in (0.1001 / lr, 1 / lr):
        allowed = re.escape(
            f"{key} is {given}; allowed: up to 0.1 / {lr}, since the highest learning "
            f"rate of the {phase} phase is {lr}"
        )
        with pytest.raises(ConfigError, match=allowed):
            parse({**values, key: given})


@pytest.mark.parametrize("given", [1.0, 8.0])
def test_a_momentum_that_grows_is_refused(given: float) -> None:
    allowed = f"train.momentum is {given}; allowed: a number from 0 below 1"
    with pytest.raises(ConfigError, match=allowed):
        parse({"train.momentum": given})


# Paths


@pytest.mark.parametrize(
    "given",
    ["../../../secret.csv", "/etc/passwd", "a/../../b", "v1/..", "~/x", ".", "a b"],
)
def test_a_revision_is_no_path(given: str) -> None:
    for name in ("", "v2", "refs/pr/1", "0123abc", "release-1.0_rc"):
        assert parse({"model.revision": name}).model.revision == name
    allowed = "model.revision is .*; allowed: a branch, a tag or a commit, or empty"
    with pytest.raises(ConfigError, match=allowed):
        parse({"model.revision": given})


@pytest.mark.parametrize("key", ["run.dir", "run.resume"])
def test_a_run_cannot_ask_which_users_a_host_has(key: str) -> None:
    parse({key: "~/runs"})
    for given in ("~root/x", "~no-such-user/x"):
        allowed = f"{key} is '{given}'; allowed: an absolute path, or empty"
        with pytest.raises(ConfigError, match=allowed):
            parse({key: given})


def test_a_run_cannot_ask_where_a_hosts_home_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = set()
    for home in ("/home/somebody", "/home/another"):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(ConfigError, match=r"run\.dir is '/home/") as caught:
            parse({"run.dir": "/home/somebody", "run.resume": "~"})
        told.add(str(caught.value))
    assert len(told) == 1
