"""Nothing that is read becomes code or an object of any kind."""

import ast
from pathlib import Path

import pytest
import torch

import slora_embedded
import slora_flwr
from slora_flwr.backbone.load import load_backbone
from slora_flwr.config import ConfigError, ModelConfig
from tests.support.tiny import make_body, save_checkpoint

PACKAGES = [Path(p.__path__[0]) for p in (slora_flwr, slora_embedded)]
SOURCES = [path for folder in PACKAGES for path in folder.rglob("*.py")]
# Modules and functions that make objects of any kind, or code, of bytes.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
# It takes a model that is loaded, and has no code to trust.
OF_PEFT = "PeftModel.from_pretrained"


def find_unsafe(source: str) -> list[str]:
    found = []
    for at in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(at, ast.Import):
            names = [alias.name for alias in at.names]
        elif isinstance(at, ast.ImportFrom):
            names = [at.module or ""]
        found += [n for n in names if n.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(at, ast.Call):
            continue
        called = ast.unparse(at.func)
        if called in UNSAFE_CALLS or called in ("torch.load", "yaml.load"):
            found.append(called)
        given = {k.arg: ast.unparse(k.value) for k in at.keywords if k.arg}
        found += ["allow_pickle"] if "allow_pickle" in given else []
        trusted = given.get("trust_remote_code", "unset")
        # On a terminal, transformers asks whether to trust where nobody says so.
        by_transformers = called.endswith(".from_pretrained") and called != OF_PEFT
        if by_transformers and trusted != "False":
            found.append(f"trust_remote_code {trusted}")
        if called in ("np.load", "numpy.load"):
            found.append(called)
    return found


def test_what_is_looked_for_is_found() -> None:
    source = """
import pickle, os
from joblib import load
torch.load(path)
eval(text)
model.eval()
np.load(path, allow_pickle=True)
AutoModel.from_pretrained(name, trust_remote_code=True)
AutoModel.from_pretrained(name)
AutoModel.from_pretrained(name, trust_remote_code=False)
"""
    assert sorted(find_unsafe(source)) == sorted(
        [
            "pickle",
            "joblib",
            "torch.load",
            "eval",
            "allow_pickle",
            "np.load",
            "trust_remote_code True",
            "trust_remote_code unset",
        ]
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert find_unsafe(path.read_text()) == []


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    model = make_body("bert")
    folder = save_checkpoint(model, tmp_path)
    load_backbone(ModelConfig(name=str(folder)), 2, 0, "all-linear")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_backbone(ModelConfig(name=str(folder)), 2, 0, "all-linear")
