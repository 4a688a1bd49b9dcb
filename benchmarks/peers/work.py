"""The work of every side: the model, the clients' batches, and a client's training.

It needs PyTorch, transformers and PEFT alone, which every peer's environment has.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

State = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """The work as `make_work` wrote it into a folder.

    Attributes
    ----------
    folder : Path
        Holds the checkpoint in `model`, and the first LoRA factors in `adapter`.
    rounds, clients, examples : int
        Number of rounds, of clients, all of which train in each, and of texts of each.
    lr : float
        The learning rate of AdamW.
    precision : str
        `float32`, or `bf16` for autocast.
    config : dict[str, Any]
        slora-flwr's flat run config for this work.
    """

    folder: Path
    rounds: int
    clients: int
    examples: int
    lr: float
    precision: str
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Work":
        """Read the work in a folder."""
        return cls(folder, **json.loads((folder / "work.json").read_text()))

    @cached_property
    def batches(self) -> list[list[list[Batch]]]:
        """The batches by round, client and step, as arguments of the model."""
        read: list[list[list[Batch]]] = torch.load(self.folder / "batches.pt")
        return read

    def make_model(self) -> Any:
        """Load the checkpoint and the first factors into it, as a `PeftModel`."""
        base = AutoModelForSequenceClassification.from_pretrained(self.folder / "model")
        adapter = self.folder / "adapter"
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).train()

    def make_optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None = None
    ) -> torch.optim.Optimizer:
        """Return a client's optimiser, for those of the parameters that are trained."""
        trained = [p for p in parameters if p.requires_grad]
        lr = self.lr if lr is None else lr
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch that trains, in float32."""
        if not model.training:
            raise RuntimeError("the model is in evaluation mode, without dropout")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits.float()

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch."""
        return cross_entropy(self.logits(model, batch), batch["labels"])

    def train_client(self, model: Any, batches: Iterable[Batch]) -> float:
        """Train the model on a client's batches, and return their mean loss."""
        optimizer = self.make_optimizer(model.parameters())
        losses = []
        for batch in batches:
            loss = self.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())


def read_state(model: Any) -> State:
    """Return a copy of what a model trains: the factors and the head."""
    return {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}


def load_state(model: Any, state: State) -> None:
    """Load what a model trains."""
    set_peft_model_state_dict(model, state)


def mean_of(states: Sequence[State]) -> State:
    """Return the mean of the clients' states; all have as many examples."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name in states[0]
    }
