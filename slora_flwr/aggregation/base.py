"""The root class of all aggregators: federated averaging."""

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
    """Federated averaging (arXiv 1602.05629): the server steps along the mean update.

    A subclass sets the `fold` that keeps what it needs of each client, and overrides
    `combine`, or `finish` if the new state is not a step from the old one.

    Attributes
    ----------
    trains : str
        Which of LoRA's factors clients train: `both`, `b`, or `in-turn`.
    steps : bool
        True if the new state is the server optimiser's step along an update. If False,
        the config must set no server optimiser.
    takes_ranks : bool
        True if clients may have factors of different ranks.
    is_mean : bool
        True if the server steps along the mean update and does nothing else with it.
        Privacy then adds noise to the mean, and robust statistics replace it.
    needs_factors : bool
        True if it acts on LoRA's factors, so that only low-rank adapters can have it.
    changes_base : bool
        True if a round changes the weights that the adapter stands on.
    renews : bool
        True if a round computes the adapter's values anew.
    needs_float32 : bool
        True if a round adds to the backbone's weights.
    fold : type[Mean]
        `Mean` keeps one running sum. `aggregation.stack.Stack` also keeps each client's
        update, so that its size grows with the cohort.
    """

    trains: ClassVar[str] = "both"
    steps: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = False
    is_mean: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    needs_float32: ClassVar[bool] = False
    fold: ClassVar[type[Mean]] = Mean

    def __init__(self, phase: Phase, config: RunConfig, head: int) -> None:
        """Set up a phase's aggregator; `head` counts the head's values in a state."""
        self.config, self.phase = config, phase
        adapter = phase.adapter_type
        self.rank_of = adapter.client_ranks(config)
        self.codec = Codec.of_upload(config.upload, adapter.is_selection, head)

    def make_fold(self) -> Mean:
        """Return an empty fold."""
        return self.fold(self.rank_of, self.codec, self.config.server.clip_norm)

    def combine(self, fold: Mean) -> State:
        """Return the update along which the server steps, here the clients' mean."""
        return fold.result()

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, and the round's change of the base.

        Parameters
        ----------
        fold : Mean
            A fold made by `make_fold`, with the clients' updates.
        sent : State
            The state that the clients started from.
        step : Callable
            Takes an update and returns the state after the server optimiser's step.
        adapter : Adapter
            The phase's adapter, attached.
        """
        state = step(self.combine(fold))
        changes = self.phase.changes_base
        return state, adapter.base_change(state) if changes else None


class PlainAverage(Aggregator):
    """Federated averaging, also of factors of different ranks."""

    takes_ranks = True
    is_mean = True
