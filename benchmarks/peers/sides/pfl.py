"""pfl-research: `FederatedAveraging` on a `SimulatedBackend`, its `PyTorchModel`.

Its own loop trains a user. It evaluates users before and after training as often as
`evaluation_frequency` says: here in the first round, which does not count.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["pfl[pytorch]==0.6.0"]
#
# [tool.peers]
# name = "pfl-research"
# package = "pfl"
# ///

import itertools
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from work import Work


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    losses: list[Tensor] = []
    found: list[float] = []

    class Classifier(nn.Module):
        """The model as pfl wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def loss(self, **batch: Tensor) -> Tensor:
            """Return the loss of a batch that trains."""
            loss = work.loss(self.model, batch)
            losses.append(loss.detach())
            return loss

        @torch.no_grad()
        def metrics(self, **batch: Tensor) -> dict[str, Any]:
            """Return the loss of a batch that evaluates."""
            rows = len(batch["labels"])
            return {"loss": Weighted(float(self.model(**batch).loss) * rows, rows)}

    class User(Dataset):
        """A user whose batches are those of the round."""

        def __init__(self, batches: list[dict[str, Tensor]]) -> None:
            super().__init__(([batch["labels"] for batch in batches],))
            self.batches = batches

        def __len__(self) -> int:
            return sum(len(batch["labels"]) for batch in self.batches)

        def iter(self, batch_size: int | None) -> Iterator[dict[str, Tensor]]:
            """Yield the batches."""
            yield from self.batches

    class Rounds(TrainingProcessCallback):
        """Notes the end of each round."""

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            """Take up the losses of the round."""
            found.append(fmean(map(float, losses)))
            losses.clear()
            ended()
            return False, Metrics()

    drawn = itertools.count()

    def make_user(user: int) -> User:
        return User(work.batches[next(drawn) // work.clients][user])

    sampler = get_user_sampler("minimize_reuse", list(range(work.clients)))
    users = FederatedDataset(make_user, sampler)
    model = Classifier()
    trained = [p for p in model.parameters() if p.requires_grad]
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        PyTorchModel(model, work.make_optimizer, torch.optim.SGD(trained, lr=1.0)),
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=None
        ),
        NNEvalHyperParams(local_batch_size=None),
        [Rounds()],
        send_metrics_to_platform=False,
    )
    return found
