"""Python that loads an export with stock libraries, as its README shows.

It sets `model` and `tokenizer`, from `folder`, the export, and `base`, the arguments by
which transformers finds the checkpoint. None of it needs slora-flwr.
"""

from dataclasses import dataclass, replace

from slora_flwr.tasks.base import Task


@dataclass(frozen=True)
class Loading:
    """How an export is loaded.

    Attributes
    ----------
    template : str
        Python that loads it, with `AUTO` in place of transformers' class.
    needs_base : bool
        True if the checkpoint is needed too.
    refused : str
        Why stock libraries refuse to load it in their usual way, as what follows
        `because`; empty if they load it.
    """

    template: str
    needs_base: bool = False
    refused: str = ""

    def code(self, task: Task) -> str:
        """Return Python that loads it for a task."""
        base = _CLASSIFIER if task.has_classes else _LANGUAGE_MODEL
        return self.template.replace(_BASE, base).replace("AUTO", task.auto_class)


_BASE = "BASE\n"
_LANGUAGE_MODEL = "model = AUTO.from_pretrained(**base)\n"
_CLASSIFIER = """\
with open(f"{folder}/classes.json") as file:
    classes = json.load(file)
model = AUTO.from_pretrained(
    **base,
    num_labels=len(classes),
    id2label=dict(enumerate(classes)),
    label2id={name: i for i, name in enumerate(classes)},
    ignore_mismatched_sizes=True,
)
"""

WHOLE = Loading("""\
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AUTO.from_pretrained(folder)
""")

ADAPTER = Loading(
    f"""\
import json

from peft import PeftModel
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
{_BASE}\
model.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(model, folder)
""",
    needs_base=True,
)

# PEFT would load such an adapter over the checkpoint as it is, and say nothing.
PATCHED_ADAPTER = Loading(
    f"""\
import json

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
{_BASE}\
model.config.pad_token_id = tokenizer.pad_token_id
# The checkpoint becomes the base on which the adapter was trained.
patch = load_file(f"{{folder}}/base_patch.safetensors")
with torch.no_grad():
    for name in {{key.rsplit(".", 1)[0] for key in patch}}:
        weight, values = model.get_parameter(name), patch[f"{{name}}.values"]
        if f"{{name}}.positions" in patch:
            at = patch[f"{{name}}.positions"]
            weight.view(-1)[at] = values.to(weight.dtype)
        else:
            weight.copy_(values)
with open(f"{{folder}}/adapter_config.json") as file:
    config = json.load(file)
config |= {{"peft_type": "LORA", "base_model_name_or_path": None}}
model = get_peft_model(model, LoraConfig.from_peft_type(**config))
found = set_peft_model_state_dict(
    model, load_file(f"{{folder}}/adapter_over_patch.safetensors")
)
assert not found.unexpected_keys
""",
    needs_base=True,
    refused="the adapter was trained over a base that differs from the checkpoint by "
    "`base_patch.safetensors`, without which it computes something else.",
)

# Packed weights have no entries to patch.
_PATCH = "# The checkpoint becomes the base on which the adapter was trained.\n"
UNPACKED_ADAPTER = replace(
    PATCHED_ADAPTER,
    template=PATCHED_ADAPTER.template.replace(
        _PATCH, f"{_PATCH}model = model.dequantize()\n"
    ),
)

_BOTTLENECKS = """\
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AUTO,
    AutoTokenizer,
)

tokenizer = AutoTokenizer.from_pretrained(folder)
config = AutoConfig.from_pretrained(folder)
model = AUTO.from_config(config)
model.load_state_dict(load_file(f"{folder}/without_bottlenecks.safetensors"))
values = load_file(f"{folder}/bottlenecks.safetensors")


def bottleneck(name, x):
    w = {part: values[f"{name}.{part}"].to(x.device) for part in PARTS}
    inner = F.ACTIVATION(F.linear(x.float(), w["down.weight"], w["down.bias"]))
    return F.linear(inner, w["up.weight"], w["up.bias"]).to(x.dtype)


def insert(name):
    def hook(module, given, out):
        return RESULT

    model.get_submodule(name).register_forward_hook(hook)


PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
for name in {key.rsplit(".", 2)[0] for key in values}:
    insert(name)
"""

# What the bottlenecks of a kind compute with, and what becomes of a module's output.
BOTTLENECKS = {
    kind: Loading(
        _BOTTLENECKS.replace("ACTIVATION", function).replace("RESULT", result),
        refused="they have no bottlenecks, without which the model computes something "
        "else.",
    )
    for kind, function, result in (
        ("houlsby", "gelu", "out + bottleneck(name, out)"),
        ("pfeiffer", "relu", "module.forward(given[0] + bottleneck(name, out))"),
    )
}
