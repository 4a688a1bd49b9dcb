"""fluke: `FedAVG` with its own `Client` and `Server`.

Its own loop trains a client. The server sends the whole model, frozen weights included,
as a copy of the module for each client.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["fluke-fl==0.8.1"]
#
# [tool.peers]
# name = "fluke"
# package = "fluke-fl"
# ///

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import ClientObserver, FederationObserver
from torch import Tensor, nn
from transformers import BatchEncoding

from work import Work


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    losses: list[float] = []
    found: list[float] = []

    class Classifier(nn.Module):
        """The model as fluke wants it: a batch without labels goes in."""

        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()
            # fluke averages all buffers, which fails for those of whole numbers.
            for module in self.modules():
                for name, buffer in [*module.named_buffers(recurse=False)]:
                    delattr(module, name)
                    setattr(module, name, buffer)

        def forward(self, batch: BatchEncoding) -> Tensor:
            """Return the logits."""
            return work.logits(self.model, batch)

    class Loader(FastDataLoader):
        """The batches of a client in the present round."""

        def __init__(self, client: int) -> None:
            labels = [batch["labels"] for batch in work.batches[0][client]]
            super().__init__(torch.cat(labels), num_labels=0, batch_size=len(labels[0]))
            self.client = client

        def __iter__(self) -> Iterator[tuple[BatchEncoding, Tensor]]:
            """Yield the batches with their labels."""
            for batch in work.batches[len(found)][self.client]:
                yield BatchEncoding(batch), batch["labels"]

        def __len__(self) -> int:
            return len(work.batches[0][self.client])

    class Rounds(ClientObserver, FederationObserver):
        """Notes the end of each round."""

        def end_fit(
            self, round: int, client_id: int, model: Any, loss: float, **_: Any
        ) -> None:
            """Take up a client's loss."""
            losses.append(loss)

        def end_round(self, round: int, **_: Any) -> None:
            """Take up the losses of the round."""
            found.append(fmean(losses))
            losses.clear()
            ended()

    optimizer = OptimizerConfigurator(
        {"name": torch.optim.AdamW, "lr": work.lr, "weight_decay": 0.0, "fused": True}
    )
    clients = [
        Client(
            client,
            Loader(client),
            None,
            optimizer,
            nn.CrossEntropyLoss(),
            local_epochs=1,
            persistency=False,  # or AdamW's moments outlive the round
        )
        for client in range(work.clients)
    ]
    FlukeENV().set_eval_cfg(server=False)
    federation = FedAVG(
        work.clients,
        None,
        DDict(),
        clients=clients,
        server=Server(Classifier(), None, clients, weighted=True),
    )
    federation.set_callbacks(Rounds())
    federation.run(work.rounds, 1.0)
    return found
