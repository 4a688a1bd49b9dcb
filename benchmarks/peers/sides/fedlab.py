"""FedLab: a `SerialClientTrainer` and a `SyncServerHandler` in a `StandalonePipeline`.

FedLab serialises all parameters of its model. Here the model that it is given holds
those that are trained, so that the frozen ones are not copied for each client.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["fedlab==1.3.0"]
#
# [tool.peers]
# name = "FedLab"
# package = "fedlab"
# ///

from collections.abc import Callable
from statistics import fmean
from typing import Any

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from torch import nn

from work import Work


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    losses: list[float] = []
    found: list[float] = []
    whole = work.make_model()

    class Trainer(SGDSerialClientTrainer):
        """Trains the factors where they are, in the whole model."""

        def __init__(self) -> None:
            super().__init__(nn.ParameterList(), work.clients)
            self._model = nn.ParameterList(trained(whole))

        def local_process(self, payload: list[Any], id_list: list[int]) -> None:
            """Train a round's clients one after the other."""
            batches = work.batches[len(found)]
            self.cache += [
                self.train(payload[0], batches[client]) for client in id_list
            ]

        def train(self, model_parameters: Any, train_loader: Any) -> list[Any]:
            """Train a client."""
            self.set_model(model_parameters)
            losses.append(work.train_client(whole, train_loader))
            return [self.model_parameters]

    class Pipeline(StandalonePipeline):
        """Notes the end of each round."""

        def evaluate(self) -> None:
            """Take up the losses of the round."""
            found.append(fmean(losses))
            losses.clear()
            ended()

    server = SyncServerHandler(nn.ParameterList(trained(whole)), work.rounds, 1.0)
    Pipeline(server, Trainer()).main()
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]
