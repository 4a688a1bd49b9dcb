"""What every adapter shares: it trains the head, and answers for itself."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slora_flwr.adapters.model_files import export_model
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RunConfig, refuse
from slora_flwr.config.schedule import Phase


class StateError(ValueError):
    """A state that does not fit the adapter it is meant for."""


class Adapter:
    """Train the head, and what a subclass adds to it.

    A subclass sets `default_lr` and overrides `state_size`, `make` and `restore`; the
    rest only where it differs from what is said here. What the rest of the package asks
    of a kind of adapter, before one is made, are the class methods.

    Attributes
    ----------
    default_lr : float
        The learning rate where the config names none.
    section : str
        The config section with a recipe of its own; empty for `train` alone.
    is_selection : bool
        True where a state is a selection of weights already, so that `upload.top-k`
        does not apply.
    learns_delta : bool
        True where the next phase starts from the delta that this one learned; such a
        class has `learned`.
    takes_delta : bool
        True where a phase can start from such a delta; such a class has `prime`.
    copies_weights : bool
        True where all weights of the backbone are kept aside while it is attached.
    folder : str
        Where the run directory has what is exported.
    scaling : float
        LoRA's s; 1 where there are no factors.
    """

    default_lr: ClassVar[float]
    section: ClassVar[str] = ""
    is_selection: ClassVar[bool] = False
    learns_delta: ClassVar[bool] = False
    takes_delta: ClassVar[bool] = False
    copies_weights: ClassVar[bool] = False
    folder: ClassVar[str] = "model"
    scaling: float = 1.0

    def __init__(self) -> None:
        self._trained: dict[str, nn.Parameter] = {}
        # Names in the state that this round does not train.
        self._idle: set[str] = set()
        self._head_before: State = {}

    @classmethod
    def from_config(cls, config: RunConfig, frozen: State | None = None) -> Self:
        """Return an adapter of the run, not attached yet.

        Parameters
        ----------
        config : RunConfig
            The run.
        frozen : State or None
            Frozen factors by target matrix that the phase's base brings.
        """
        return cls()

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError for a run config that this adapter cannot run with."""

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Raise ConfigError for a backbone that this adapter cannot act on."""

    @classmethod
    def changes_base(cls, config: RunConfig) -> bool:
        """Return whether each round changes the weights that the adapter stands on."""
        return False

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a whole state, whatever is attached.

        Parameters
        ----------
        config : RunConfig
            The run.
        backbone : Backbone
            Shapes; `head_size` of the values are the head's.
        """
        raise NotImplementedError

    @classmethod
    def traffic(
        cls,
        phase: Phase,
        config: RunConfig,
        backbone: Backbone,
        phase_round: int,
        client: int,
    ) -> tuple[int, int]:
        """Return how many values a client is sent in a round and how many it returns.

        Parameters
        ----------
        phase : Phase
            One of the schedule's.
        config, backbone
            As of `state_size`.
        phase_round : int
            The round within the phase, from 1.
        client : int
            Its id; clients may have factors of different ranks.
        """
        whole = cls.state_size(config, backbone)
        return whole, whole

    @classmethod
    def base_layout(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, rounds_before: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, NDArray[np.int64]], float]:
        """Return what the base that the phase starts from is made of.

        Parameters
        ----------
        phase, config, backbone
            As of `traffic`.
        rounds_before : int
            Rounds of the phase before.

        Returns
        -------
        shapes : dict
            Layout of `BaseWeights.state`, empty for W_0.
        positions : dict
            Positions of the sparse values in each target matrix, row-major.
        scaling : float
            LoRA's s.
        """
        return {}, {}, 1.0

    @classmethod
    def change_size(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, cohort: int
    ) -> int:
        """Return the most values by which a round of so many clients changes the base.

        It is asked only of a phase that `changes_base`.
        """
        raise NotImplementedError

    @classmethod
    def start(
        cls, phase: Phase, config: RunConfig, backbone: Backbone
    ) -> tuple[State, BaseWeights | None]:
        """Return where a phase starts that nothing primes.

        Nothing is attached to the backbone, before and after.

        Returns
        -------
        state : State
            What differs from the adapter's own start.
        base : BaseWeights or None
            None for W_0.
        """
        return {}, None

    @classmethod
    def client_ranks(cls, config: RunConfig) -> Callable[[int], int] | None:
        """Return each client's rank by its id, None where all train the same values."""
        return None

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Put the trained parameters into a backbone; return them by name.

        The names are those of the state. The head is not among them.
        """
        return {}

    def restore(self, backbone: Backbone) -> None:
        """Take out again, bit for bit, what `make` put into the backbone."""

    def attach(self, backbone: Backbone) -> None:
        """Make the trained parameters on a resident backbone, without a copy of it."""
        self.backbone = backbone
        self._head_before = {n: p.detach().clone() for n, p in backbone.head.items()}
        # The head comes last, so that a state reads adapter first in every phase.
        self._trained = {**self.make(backbone), **backbone.head}
        for parameter in self._trained.values():
            parameter.requires_grad_(True)

    def detach(self) -> None:
        """Leave the backbone as it was before `attach`, bit for bit."""
        for parameter in self._trained.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.restore(self.backbone)
        with torch.no_grad():
            for name, parameter in self.backbone.head.items():
                parameter.copy_(self._head_before[name])
        self._trained, self._head_before = {}, {}

    def begin(self, phase_round: int) -> None:
        """Get ready for a round of the phase, from 1; most train alike in all."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser trains, in the order of `state`."""
        return [p for name, p in self._trained.items() if name not in self._idle]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the layout of a state: names and shapes in their stable order."""
        return {name: p.shape for name, p in self._trained.items()}

    def sent(self) -> dict[str, torch.Size]:
        """Return the layout of what a client is sent of a state."""
        return self.shapes()

    def complete(self, sent: State) -> State:
        """Return a whole state, from what a client was sent."""
        return sent

    def returned(self) -> dict[str, torch.Size]:
        """Return the layout of what a client returns: what this round trains."""
        return {n: s for n, s in self.shapes().items() if n not in self._idle}

    def change_shapes(self, backbone: Backbone, rank: int) -> dict[str, torch.Size]:
        """Return the layout of a round's change of the base, if the phase has any."""
        raise NotImplementedError

    def change(self, backbone: Backbone, change: State, phase_round: int) -> None:
        """Change the base as a round of the phase did, while detached."""
        raise NotImplementedError

    def learned(
        self, state: State, rounds: int
    ) -> tuple[dict[str, NDArray[np.int64]], State]:
        """Return the entries that so many rounds trained, where it `learns_delta`.

        Parameters
        ----------
        state : State
            The last round's, of this adapter, which must be attached.
        rounds : int
            Rounds of the phase so far.

        Returns
        -------
        positions : dict[str, NDArray[np.int64]]
            For each target matrix, row-major positions, (k,).
        values : State
            The weights there, (k,), float32.
        """
        raise NotImplementedError

    def base_change(self, state: State) -> State:
        """Return what a round's new state changes of the base, by this adapter alone.

        It is asked only of a phase that `changes_base`.
        """
        sent = self.sent()
        return {name: tensor for name, tensor in state.items() if name not in sent}

    def whole(self, state: State) -> State:
        """Return a state with the frozen values that it is left without."""
        return state

    def cut(self, state: State, rank: int) -> State:
        """Return what a client of a rank trains on, zeros in place of the rest."""
        return state

    def state(self) -> State:
        """Return a copy of the trained values in their order, float32 on the CPU."""
        return {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self._trained.items()
        }

    def known(self) -> State:
        """Return the values that whoever has W_0 knows without a message.

        Just after `attach`. A random start, of a head or of factors, is not among them,
        since its bits may depend on the machine.
        """
        return {n: t for n, t in self.state().items() if n not in self.backbone.head}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained values.

        Raises
        ------
        StateError
            If a name is missing or unknown, or a shape differs.
        """
        given = {name: tensor.shape for name, tensor in state.items()}
        if given != self.shapes():
            odd = sorted(set(given.items()) ^ set(self.shapes().items()))
            raise StateError(f"the state does not fit the adapter: {odd[:4]} differ")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state[name])
        self.commit()

    def commit(self) -> None:
        """Make the backbone compute with the trained values, after each change."""

    def fingerprint(self) -> str:
        """Digest the layout (and the mask where there is one), 32 hex digits."""
        layout = "\x1e".join(f"{n}\x1f{tuple(s)}" for n, s in self.shapes().items())
        return hashlib.blake2b(layout.encode(), digest_size=16).hexdigest()

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> None:
        """Write a final state in a format that stock libraries load.

        The whole model is written where PEFT has no format for the adapter.

        Parameters
        ----------
        folder : Path
            An empty folder.
        state : State
            Of this adapter, which is attached.
        base : BaseWeights or None
            What it stands on.
        classes : list[str]
            The label names, in the order of class ids.
        leave : Callable
            Makes the backbone W_0 again, with nothing attached.
        """
        self.load(state)
        export_model(folder, self.backbone, classes)


def require_float32(config: RunConfig, why: str) -> None:
    """Refuse weights in half precision.

    Raises
    ------
    ConfigError
        With the reason why this adapter needs float32.
    """
    if config.model.dtype != "float32":
        raise refuse("model.dtype", config.model.dtype, f"float32{why}")


def require_targets(config: RunConfig, backbone: Backbone) -> None:
    """Refuse a backbone without target matrices.

    Raises
    ------
    ConfigError
        If the blocks hold no linear layers.
    """
    if not backbone.targets:
        raise ConfigError(
            f"model.name is {config.model.name!r}, whose blocks hold no linear layers; "
            f"allowed for {config.method}: a model that has some, or method fft or head"
        )
