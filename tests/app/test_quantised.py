"""Frozen layers in 8 and 4 bits: rounds, resuming, nodes, exports and the plan."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slora_flwr.adapters.export import apply_base_patch
from slora_flwr.backbone import quantised
from slora_flwr.backbone.load import digest_of, load_backbone, outline_backbone
from slora_flwr.backbone.quantised import is_quantised, scales_of, weight_of
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, ModelConfig, parse
from slora_flwr.config.rules import check
from slora_flwr.config.schedule import make_schedule
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.planning.memory import plan_memory
from slora_flwr.runs.reader import read_run
from slora_flwr.server.export import export_run
from slora_flwr.server.run import run
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.trainer import Trainer
from tests.support.causal import save_language_model, write_dialogues
from tests.support.grids import Grid
from tests.support.plain_rounds import PlainRounds
from tests.support.resuming import assert_same, go_on, stop
from tests.support.runs import Config, elsewhere, start, summary

pytest.importorskip("bitsandbytes")

KINDS = ("4bit", "8bit")
# Llama, and GPT-2, whose checkpoint holds weights transposed, and biases. Rows that 64
# divides, since bitsandbytes is right about others on some CPUs only.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {
        "n_embd": 64,
        "n_inner": 128,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
}
# Of a loss: LLM.int8() rounds a layer's inputs to 8 bits in evaluations, on CPUs, and
# not in training. Measured with these models: up to 0.011.
INT8_ERROR = 0.02
# Evaluates what exports' README.md loads.
STOCK = """
import json, os, sys
for name in ("slora_flwr", "slora_embedded"):
    sys.modules[name] = None
import torch
import bitsandbytes.nn.modules as layers
# It would evaluate in bf16 on some CPUs, and fails there on layers this small.
layers.has_avx512bf16 = lambda: False
from safetensors.torch import load_file
for place in json.load(sys.stdin):
    os.chdir(place["folder"])
    given = {}
    exec(place["code"], given)
    examples = load_file(place["examples"])
    with torch.no_grad():
        out = given["model"].eval()(
            input_ids=examples["ids"], attention_mask=examples["mask"])
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].float().transpose(1, 2), examples["labels"][:, 1:])
    print("FOUND " + str(float(loss)))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_language_model(name, root / name, **sizes)
        for name, sizes in MODELS.items()
    }


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.csv")


def make(
    model: Path, dialogues: Path, directory: Path, kind: str, **changes: Any
) -> Config:
    config: Config = {
        "task": "causal-lm",
        "method": "slora",
        "rounds": 3,
        "model.name": str(model),
        "model.quantize": kind,
        "data.name": str(dialogues),
        "data.text": "prompt,input",
        "data.response": "response",
        "data.max-length": 24,
        "clients.by": "category",
        "clients.partitioner": "natural",
        "clients.count": 3,
        "clients.per-round": 3,
        "train.lr": 0.01,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": 4,
        "run.dir": str(directory),
    }
    return config | changes


def stock_model(folder: Path, kind: str) -> Any:
    """Return a model as transformers quantises it."""
    config = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head"],
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", quantization_config=config
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_layers_hold_what_transformers_would_have_them_hold(
    family: str, kind: str, folders: dict[str, Path]
) -> None:
    backbone = load_backbone(
        ModelConfig(str(folders[family]), quantize=kind),
        None,
        0,
        task=find_task(parse({"task": "causal-lm"})),
    )
    plain = load_backbone(ModelConfig(str(folders[family])), None, 0)
    stock = stock_model(folders[family], kind)
    found = dict(stock.named_modules())
    assert backbone.targets.keys() == plain.targets.keys()
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert type(module) is type(found[name])
            assert is_quantised(module) == (name in backbone.targets)
    for name, module in backbone.targets.items():
        assert torch.equal(module.weight, found[name].weight)
        assert torch.equal(scales_of(module), scales_of(found[name]))
    unpacked = stock.dequantize()
    for name, module in backbone.targets.items():
        expected = unpacked.get_submodule(name).weight
        torch.testing.assert_close(weight_of(module), expected, rtol=1e-6, atol=0)
        assert not torch.equal(expected, plain.targets[name].weight)
    assert backbone.size == plain.size
    assert backbone.target_size == plain.target_size
    assert backbone.digest != plain.digest


# Each method and structure with both models and both kinds, and those with each other.
TRAINED = [("lora", "unstructured"), ("bitfit", "unstructured")]
TRAINED += [
    (method, structure)
    for method in ("sft", "slora")
    for structure in ("unstructured", "rows", "columns")
]
ROUNDS = [
    (family, KINDS[(number + place) % 2], *trained)
    for number, trained in enumerate(TRAINED)
    for place, family in enumerate(MODELS)
    if trained[0] != "bitfit" or family == "gpt2"  # Llamas have no biases
]


@pytest.mark.parametrize(("family", "kind", "method", "structure"), ROUNDS)
def test_a_round_is_that_of_the_unpacked_weights_in_plain_pytorch(
    family: str,
    kind: str,
    method: str,
    structure: str,
    folders: dict[str, Path],
    dialogues: Path,
    tmp_path: Path,
) -> None:
    """Dense W_dq with the masked values, W_dq + s·B·A; the layers' bits stay."""
    given = make(folders[family], dialogues, tmp_path / "run", kind, method=method)
    given |= {
        "rounds": 2 if method == "slora" else 1,
        "server.average": "none",
        "sparse.mask": structure,
        "train.batch-size": 200,
        "train.epochs": 2,
        "train.lr": 0.2,
        "train.optimizer": "sgd",
        "download.base-dtype": "float32",  # which would round the start
    }
    if structure != "unstructured":  # whose deltas have no higher rank
        given["lora.rank"] = 1
    config = parse(given)
    trainer = Trainer(config)
    model = trainer.model.backbone.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    begun: State = {}
    for phase in trainer.schedule:
        adapter = trainer.model.attach(phase)
        adapter.begin(1)
        begun |= adapter.whole(adapter.state())
        trainer.train_client(0, adapter.state(), phase, 1)
        trainer.model.detach()
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    unpacked = tmp_path / "unpacked"
    stock_model(folders[family], kind).dequantize().save_pretrained(unpacked)
    if family == "gpt2":  # whose files have these weights transposed
        _transpose(unpacked)
    plain = PlainRounds(
        parse(given | {"model.name": str(unpacked), "model.quantize": ""}),
        trainer,
        begun,
    )
    expected = plain.run()
    assert abs(expected - plain.first) > 1e-3
    error = 1e-5 if kind == "4bit" else INT8_ERROR
    found = run(InlineGrid(given), given, 1)["loss"]
    assert found == pytest.approx(expected, abs=error)


def _transpose(folder: Path) -> None:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    state = load_file(path)
    for name in state:
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
            state[name] = state[name].T.contiguous()
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "slora"])
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, kind: str, folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    config = make(folders["llama"], dialogues, tmp_path / "whole", kind, method=method)
    whole = start(config, Grid(config, nodes=2))
    config = elsewhere(config)
    stopped = stop(config, 3)
    go_on(config)
    assert_same(stopped, whole)


@pytest.mark.parametrize("method", ["lora", "slora"])
def test_the_result_does_not_depend_on_the_number_of_nodes(
    method: str, folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    made = []
    for nodes in (1, 3):
        directory = tmp_path / f"{nodes}"
        config = make(folders["gpt2"], dialogues, directory, "4bit", method=method)
        made.append(summary(start(config, Grid(config, nodes=nodes))))
    one, other = made
    for key in ("loss", "perplexity", "accuracy", "payload_bytes_up"):
        assert one[key] == other[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_run_in_bf16_is_that_in_float32_but_for_its_rounding(
    kind: str, density: float, folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    """With sparse products and with dense ones, of which CPUs have the latter alone."""
    found: list[float] = []
    for changes in ({}, {"model.dtype": "bfloat16"}, {"train.precision": "bf16"}):
        config = make(
            folders["llama"],
            dialogues,
            tmp_path / f"{len(found)}",
            kind,
            method="slora",
            **{"sparse.density": density, **changes},
        )
        found.append(summary(start(config, Grid(config)))["loss"])
    assert found[1] != found[0]
    assert found[2] != found[0]
    assert found[1:] == pytest.approx(2 * [found[0]], rel=0.02)


def test_each_setting_has_a_digest_of_its_own(folders: dict[str, Path]) -> None:
    """A node that computes with other weights than the server's is left out by it."""
    task = find_task(parse({"task": "causal-lm"}))
    settings = [("float32", ""), ("float32", "4bit"), ("float32", "8bit")]
    settings += [("bfloat16", ""), ("bfloat16", "4bit")]
    digests = {
        digest_of(ModelConfig(str(folders["llama"]), "", *setting), task)
        for setting in settings
    }
    assert len(digests) == len(settings)


def test_scales_are_part_of_the_digest(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        config = ModelConfig(str(folders["llama"]), quantize=kind)
        one, other = (load_backbone(config, None, 0) for _ in range(2))
        scales_of(next(iter(other.targets.values())))[0] *= 2
        assert one.digest != other.digest


@pytest.mark.parametrize("family", MODELS)
def test_exports_have_the_runs_loss_in_stock_libraries(
    family: str, folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    """Adapters over the public checkpoint; whole models are unpacked, and say so."""
    places, expected = [], []
    for kind in KINDS:
        for method in ("lora", "slora", "sft"):
            name = f"{kind}-{method}"
            config = make(
                folders[family], dialogues, tmp_path / name, kind, method=method
            )
            directory = start(config, Grid(config))
            test = Trainer(parse(read_run(directory).config)).data.tokenised.test
            ids, mask, labels = test.batch(np.arange(len(test)))
            examples = tmp_path / f"{name}.safetensors"
            save_file({"ids": ids, "mask": mask, "labels": labels}, examples)
            for merge in (False, True):
                to = tmp_path / f"{name}-{merge}"
                export_run(directory, "averaged", merge, to)
                (to / family).symlink_to(folders[family])
                card = (to / "README.md").read_text()
                whole = merge or method == "sft"
                assert f"`{kind}` in the run" in card
                assert ("unpacked here" in card) == whole
                assert ("bitsandbytes" in card) != whole
                code = re.findall(r"```python\n(.*?)```", card, re.S)[0]
                place = {"folder": str(to), "code": code, "examples": str(examples)}
                places.append(place)
                # Adapters that PEFT loads itself stand on packed layers.
                is_exact = kind == "4bit" or (method, merge) == ("lora", False)
                error = 1e-5 if is_exact else INT8_ERROR
                expected.append(pytest.approx(summary(directory)["loss"], abs=error))
    done = subprocess.run(
        [sys.executable, "-P", "-c", STOCK],
        input=json.dumps(places),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
    for place, line, loss in zip(places, lines, expected, strict=True):
        assert float(line.removeprefix("FOUND ")) == loss, place["folder"]


def test_a_patch_of_packed_weights_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    path = tmp_path / "base_patch.safetensors"
    at, values = torch.arange(2), torch.ones(2)
    save_file({f"{name}.positions": at, f"{name}.values": values}, path)
    model = stock_model(folders["llama"], "4bit")
    with pytest.raises(ValueError, match="dequantize"):
        apply_base_patch(model, path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "fft"}, "empty for fft, which trains these weights"),
        ({"method": "fedex-lora"}, "aggregator exact adds to the weights"),
        ({"sparse.schedule": "per-round"}, "per-round writes to the weights"),
    ],
)
def test_what_writes_to_weights_is_refused_by_name(
    changes: dict[str, Any], why: str, folders: dict[str, Path], dialogues: Path
) -> None:
    with pytest.raises(ConfigError, match=f"model.quantize is '4bit'.*{why}"):
        check(parse(make(folders["llama"], dialogues, Path("/run"), "4bit", **changes)))


def test_a_missing_package_and_transformers_names_are_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        parse({"load_in_4bit": True})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'slora-flwr\[quantize\]'"):
        load_backbone(ModelConfig(str(folders["llama"]), quantize="4bit"), None, 0)


def test_a_device_that_cannot_compute_so_is_named(folders: dict[str, Path]) -> None:
    absent = "mps" if sys.platform == "linux" else "xpu"
    model = AutoModelForCausalLM.from_pretrained(folders["llama"]).requires_grad_(False)
    for kind in KINDS:
        with pytest.raises(ConfigError, match=f"'{kind}'.* cannot .* on {absent} here"):
            quantised.quantise(model, {}, kind, torch.device(absent))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bytes_that_layers_hold(
    kind: str,
    folders: dict[str, Path],
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the config alone too, and without bitsandbytes then."""
    config = parse(make(folders["llama"], dialogues, tmp_path / "run", kind))
    task = find_task(config)
    backbone = load_backbone(config.model, None, 0, task=task)
    held = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    for module in backbone.targets.values():
        held += scales_of(module).numel() * 4
        state = getattr(module.weight, "quant_state", None)
        held += state.code.numel() * 4 if state is not None else 0
    plain = load_backbone(replace(config.model, quantize=""), None, 0, task=task)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    outline = outline_backbone(config.model, None, task=task)
    for phase in make_schedule(config):
        planned = plan_memory(phase, config, backbone)
        assert planned.weights == held
        assert planned.unpacked == 4 * 64 * 128
        assert plan_memory(phase, config, plain).activations == planned.activations
        # Whose activations are counted otherwise, packed or not.
        found = replace(plan_memory(phase, config, outline), activations=0)
        assert found == replace(planned, activations=0)


def test_a_packed_layers_output_is_its_unpacked_weights(
    folders: dict[str, Path],
) -> None:
    """In 4 bits to the last bit, in evaluations too, whatever the processor."""
    config = ModelConfig(str(folders["gpt2"]), quantize="4bit")
    backbone = load_backbone(config, None, 0)
    for name, module in backbone.targets.items():
        x = torch.randn(3, 5, module.in_features)
        expected = F.linear(x, weight_of(module), module.bias)
        for training in (True, False, True):
            module.train(training)
            assert torch.equal(module(x), expected), name


# On some CPUs bitsandbytes 0.50 takes wrong scales of rows that 64 does not divide.
@pytest.mark.parametrize("width", [32, 48, 64, 96, 128, 160])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_with_the_weight_that_it_was_given_or_is_refused(
    kind: str, width: int
) -> None:
    """Rounding to 4 bits is worth a tenth of the norm, and to 8 a hundredth."""
    linear = torch.nn.Linear(width, 48, bias=False).requires_grad_(False)
    weight, model = linear.weight.clone(), torch.nn.Sequential(linear)
    try:
        quantised.quantise(model, {"0": linear}, kind, torch.device("cpu"))
    except ConfigError as error:
        assert width % 64
        assert f"wrong products with 0, 48 x {width}" in str(error)  # noqa: PT017
        return
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(1))
    found, right = model(x), x @ weight.T
    bound = 0.15 if kind == "4bit" else 0.02
    assert float((found - right).norm() / right.norm()) < bound
