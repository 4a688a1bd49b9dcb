"""What every aggregator answers for itself; the base is federated averaging."""

from collections.abc import Callable
from typing import ClassVar

from slora_flwr.adapters.base import Adapter
from slora_flwr.aggregation.mean import Mean
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import Phase
from slora_flwr.wire.codec import Codec

Step = Callable[[State], State]


class Aggregator:
    """Federated averaging (arXiv 1602.05629): a step of the server along the mean.

    A subclass names the `fold` that keeps what it needs of each client, and overrides
    `combine`, or `finish` where the new state is not a step from the old one.

    Attributes
    ----------
    trains : str
        Which of LoRA's factors clients train: `both`, `b`, or `in-turn`.
    steps : bool
        True where the new state is a step of the server's optimiser along an update.
        Else the optimiser is none, since its result is a weight.
    takes_ranks : bool
        True where clients may have factors of different ranks.
    is_mean : bool
        True where the result depends on the mean update alone, to which noise can be
        added, and in whose place a robust statistic can stand.
    changes_base : bool
        True where a round changes the weights that the adapter stands on.
    renews : bool
        True where a round makes the adapter's values anew.
    needs_float32 : bool
        True where it adds to the weights of the backbone.
    fold : type[Mean]
        `Mean` keeps one running sum; `aggregation.stack.Stack` each client's update
        too, so that it grows with the cohort.
    """

    trains: ClassVar[str] = "both"
    steps: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = False
    is_mean: ClassVar[bool] = True
    changes_base: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    needs_float32: ClassVar[bool] = False
    fold: ClassVar[type[Mean]] = Mean

    def __init__(self, phase: Phase, config: RunConfig, head: int) -> None:
        """Take a phase of a run whose states end with so many values of the head."""
        self.config, self.phase = config, phase
        adapter = phase.adapter_type
        self.rank_of = adapter.client_ranks(config)
        self.codec = Codec.of_upload(config.upload, adapter.is_selection, head)

    def make_fold(self) -> Mean:
        """Return an empty fold: what it needs of each client is its class's."""
        return self.fold(self.rank_of, self.codec, self.config.server.clip_norm)

    def combine(self, fold: Mean) -> State:
        """Return the update along which the server steps: the mean of the clients'."""
        return fold.result()

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, and what it changes of the base.

        Parameters
        ----------
        fold : Mean
            Of `make_fold`, with the clients' updates.
        sent : State
            What the clients started from.
        step : Callable
            Takes an update; returns the server's state after its optimiser's step.
        adapter : Adapter
            The phase's, attached.
        """
        state = step(self.combine(fold))
        changes = self.phase.changes_base
        return state, adapter.base_change(state) if changes else None


class PlainAverage(Aggregator):
    """Federated averaging, of factors of different ranks too."""

    takes_ranks = True
