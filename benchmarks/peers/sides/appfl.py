"""APPFL: a `VanillaTrainer` for each client, and a `FedAvgAggregator`.

Its own loop trains a client. Whole states of the model are sent, frozen weights
included. What its agents add, a network between them, is left out.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "omegaconf", "opacus", "packaging", "scipy", "wandb"]
#
# [tool.peers]
# name = "APPFL"
# package = "appfl"
# without-dependencies = ["appfl==1.12.0"]
# ///

from collections.abc import Callable
from copy import deepcopy
from statistics import fmean
from typing import Any

from appfl.algorithm.aggregator import FedAvgAggregator
from appfl.algorithm.trainer.vanilla_trainer import VanillaTrainer
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import BatchEncoding

from work import Batch, Work


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    losses: list[float] = []
    found: list[float] = []

    class Classifier(nn.Module):
        """The model as APPFL wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def forward(self, batch: BatchEncoding) -> Tensor:
            """Return the logits."""
            return work.logits(self.model, batch)

    class Log:
        """Takes up the loss of each epoch."""

        def log_title(self, titles: list[str]) -> None:
            """Start a table."""
            self.set_title(titles)

        def set_title(self, titles: list[str]) -> None:
            """Name the columns."""
            self.column = titles.index("Train Loss")

        def log_content(self, cells: list[Any]) -> None:
            """Take up a row."""
            losses.append(cells[self.column])

    settings = {
        "mode": "epoch",
        "num_local_epochs": 1,
        "optim": "AdamW",
        "optim_args": {"lr": work.lr, "weight_decay": 0.0, "fused": True},
    }
    model = Classifier()
    trainers = [
        VanillaTrainer(
            deepcopy(model),
            nn.CrossEntropyLoss(),
            accuracy,
            split(work.batches[0][client]),
            train_configs=DictConfig(settings),
            logger=Log(),
            client_id=str(client),
        )
        for client in range(work.clients)
    ]
    server = FedAvgAggregator(model, DictConfig({"client_weights_mode": "sample_size"}))
    for client in range(work.clients):
        server.set_client_sample_size(client, work.examples)
    state = server.get_parameters()
    for clients in work.batches:
        sent = {}
        for client, (trainer, batches) in enumerate(
            zip(trainers, clients, strict=True)
        ):
            trainer.train_dataloader = split(batches)
            trainer.load_parameters(state)
            trainer.train()
            sent[client], _ = trainer.get_parameters()
        state = server.aggregate(sent)
        found.append(fmean(losses))
        losses.clear()
        ended()
    return found


def accuracy(labels: Any, outputs: Any) -> float:
    """Return the share of outputs that are greatest at the label."""
    return float((outputs.argmax(1) == labels).mean())


def split(batches: list[Batch]) -> list[tuple[BatchEncoding, Tensor]]:
    """Return what APPFL takes from a loader: inputs that can be moved, and labels."""
    return [(BatchEncoding(batch), batch["labels"]) for batch in batches]
