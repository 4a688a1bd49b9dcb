"""Loads exports with stock PEFT and transformers; no slora_flwr can be imported.

Standard input is a JSON list of places. At each it is tried in all ways, and what comes
out is printed as JSON: for each way the loss on the place's examples, or the error.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("slora_flwr", "slora_embedded"):
    sys.modules[name] = None  # type: ignore[assignment]
try:
    import slora_flwr  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("slora_flwr can be imported")

import torch  # noqa: E402
from peft import (  # noqa: E402
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
)
from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    pipeline,
)

# The name of the checkpoint at the place at hand.
CHECKPOINT = [""]
Auto: Any = AutoModelForSequenceClassification


def read_code(readme: str) -> str:
    """Return all Python of a README."""
    return "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))


def by_readme(labels: int) -> Any:
    """Do as the README says."""
    given: dict[str, Any] = {}
    exec(read_code(Path("README.md").read_text()), given)
    assert isinstance(given["found"][0], int)
    return given["model"]


def by_load_adapter(labels: int) -> Any:
    model = Auto.from_pretrained(CHECKPOINT[0], num_labels=labels)
    model.load_adapter(".")
    return model


def by_peft(labels: int, **given: Any) -> Any:
    model = Auto.from_pretrained(CHECKPOINT[0], num_labels=labels)
    return PeftModel.from_pretrained(model, ".", **given)


def by_peft_config(labels: int) -> Any:
    """Give PEFT the config, so that it does not ask for the export's."""
    read = json.loads(Path("adapter_config.json").read_text())
    config = LoraConfig.from_peft_type(**(read | {"peft_type": "LORA"}))
    return by_peft(labels, config=config)


def by_pipeline(labels: int) -> Any:
    return pipeline("text-classification", model=".").model


WAYS: dict[str, Callable[[int], Any]] = {
    "README": by_readme,
    "PeftModel": by_peft,
    "PeftModel, config given": by_peft_config,
    "load_adapter": by_load_adapter,
    "AutoPeftModel": lambda _: AutoPeftModel.from_pretrained("."),
    "AutoPeft": lambda _: AutoPeftModelForSequenceClassification.from_pretrained("."),
    "AutoPeft, labels": lambda labels: (
        AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels=labels)
    ),
    "Auto": lambda _: Auto.from_pretrained("."),
    "Auto, labels": lambda labels: Auto.from_pretrained(".", num_labels=labels),
    "Bert": lambda _: BertForSequenceClassification.from_pretrained("."),
    "pipeline": by_pipeline,
}


def loss_of(model: Any, examples: dict[str, torch.Tensor]) -> float:
    """Return a model's mean loss over examples."""
    with torch.no_grad():
        out = model.eval()(
            input_ids=examples["ids"], attention_mask=examples["mask"]
        ).logits
    return float(F.cross_entropy(out.float(), examples["labels"]))


def main() -> None:
    """Try all ways at all places."""
    found: dict[str, dict[str, float | str]] = {}
    for name, place in json.load(sys.stdin).items():
        os.chdir(place["folder"])
        CHECKPOINT[0] = place["checkpoint"]
        examples, found[name] = load_file(place["examples"]), {}
        for way, load in WAYS.items():
            torch.manual_seed(5)  # of heads that no file holds
            try:
                loss = loss_of(load(place["labels"]), examples)
            except Exception as error:
                found[name][way] = f"{type(error).__name__}: {error}"
            else:
                found[name][way] = loss
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
