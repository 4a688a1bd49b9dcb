"""The root class of all adapters: it trains the head and describes itself."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slora_flwr.adapters.loading import WHOLE, Loading
from slora_flwr.adapters.model_files import export_model
from slora_flwr.adapters.per_example import Use, find_uses
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.families import expert_weights
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RunConfig, refuse
from slora_flwr.config.schedule import Phase


class StateError(ValueError):
    """A state does not fit the adapter that loads it."""


class Adapter:
    """Train the head, and whatever parameters a subclass adds.

    A subclass sets `default_lr` and overrides `state_size`, `make` and `restore`, and
    whatever else differs from the defaults here. The class methods answer what the rest
    of the package needs to know about a kind of adapter before an instance exists.

    Attributes
    ----------
    default_lr : float
        Learning rate if the config sets none.
    section : str
        Config section that overrides `train` for this adapter; empty if there is none.
    is_selection : bool
        True if the state already holds only a selection of the weights, so that
        `upload.top-k` does not apply.
    learns_delta : bool
        True if the next phase starts from the delta learned here; such a class
        implements `learned`.
    takes_delta : bool
        True if a phase can start from such a delta; such a class implements `prime` and
        `primed_rank`.
    is_low_rank : bool
        True if the state holds LoRA's factors, on which some aggregators act.
    is_head : bool
        True if it trains nothing but the head, so that there is but one learning rate.
    copies_weights : bool
        True if attaching keeps a copy of all backbone weights.
    folder : str
        Folder of the run directory that receives the export.
    scaling : float
        LoRA's s; 1 if there are no factors.
    """

    default_lr: ClassVar[float]
    section: ClassVar[str] = ""
    is_selection: ClassVar[bool] = False
    learns_delta: ClassVar[bool] = False
    takes_delta: ClassVar[bool] = False
    is_low_rank: ClassVar[bool] = False
    is_head: ClassVar[bool] = False
    copies_weights: ClassVar[bool] = False
    folder: ClassVar[str] = "model"
    scaling: float = 1.0

    def __init__(self) -> None:
        self._trained: dict[str, nn.Parameter] = {}
        # Names in the state that this round does not train.
        self._idle: set[str] = set()
        self._head_before: State = {}
        self._base: BaseWeights | None = None

    @classmethod
    def from_config(
        cls, config: RunConfig, trains: str = "both", frozen: State | None = None
    ) -> Self:
        """Return a detached adapter, built from a run config.

        Parameters
        ----------
        config : RunConfig
            The run.
        trains : str
            Which factors the phase's aggregator has clients train; see `Aggregator`.
        frozen : State or None
            Frozen factors of the phase's base, named as in a low-rank state.
        """
        return cls()

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError if this adapter cannot run with the config."""

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Raise ConfigError if this adapter cannot be attached to the backbone."""

    @classmethod
    def changes_base(cls, config: RunConfig) -> bool:
        """Return whether each round changes the base."""
        return False

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state.

        Parameters
        ----------
        config : RunConfig
            The run.
        backbone : Backbone
            The backbone, which may have any adapter attached.
        """
        raise NotImplementedError

    @classmethod
    def kept_bytes(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the bytes that an attached adapter holds beside what it trains.

        That is what restores W_0, and what tells which weights are trained.

        Parameters
        ----------
        config, backbone
            As for `state_size`.
        """
        return 4 * backbone.head_size

    @classmethod
    def traffic(
        cls,
        phase: Phase,
        config: RunConfig,
        backbone: Backbone,
        phase_round: int,
        client: int,
    ) -> tuple[int, int]:
        """Return how many values a client receives and returns in a round.

        Parameters
        ----------
        phase : Phase
            A phase of the schedule.
        config, backbone
            As for `state_size`.
        phase_round : int
            The round within the phase, from 1.
        client : int
            The client's id; clients may have factors of different ranks.
        """
        whole = cls.state_size(config, backbone)
        return whole, whole

    @classmethod
    def base_layout(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, rounds_before: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, NDArray[np.int64]], float]:
        """Return the layout of the base that the phase starts from.

        Parameters
        ----------
        phase, config, backbone
            As for `traffic`.
        rounds_before : int
            Number of rounds in the preceding phase.

        Returns
        -------
        shapes : dict
            Layout of `BaseWeights.state`, empty for W_0.
        positions : dict
            Row-major positions of the sparse values in each target matrix.
        scaling : float
            LoRA's s.
        """
        return {}, {}, 1.0

    @classmethod
    def change_size(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, cohort: int
    ) -> int:
        """Return the largest number of values in a round's change of the base.

        Called only for a phase that `changes_base`.

        Parameters
        ----------
        phase, config, backbone
            As for `traffic`.
        cohort : int
            Number of clients in the round.
        """
        raise NotImplementedError

    @classmethod
    def start(
        cls, phase: Phase, config: RunConfig, backbone: Backbone
    ) -> tuple[State, BaseWeights | None]:
        """Return the start of a phase that is not primed by an earlier one.

        No adapter may be attached; none is attached afterwards.

        Returns
        -------
        state : State
            The values that differ from the adapter's own initialisation.
        base : BaseWeights or None
            The base; None for W_0.
        """
        return {}, None

    @classmethod
    def prime(
        cls,
        config: RunConfig,
        trains: str,
        backbone: Backbone,
        positions: Mapping[str, NDArray[np.int64]],
        values: State,
        head: State,
    ) -> Any:
        """Return the start of a primed phase, a `slora_flwr.adapters.handoff.Handoff`.

        Asked only of a class that `takes_delta`. Nothing is attached to the backbone.

        Parameters
        ----------
        config, trains
            As of `from_config`.
        backbone : Backbone
            The backbone with W_0.
        positions, values
            As the phase before has `learned` them.
        head : State
            The head that it trained.
        """
        raise NotImplementedError

    @classmethod
    def primed_rank(cls, config: RunConfig) -> int:
        """Return the rank up to which `prime` keeps what the phase before learned."""
        raise NotImplementedError

    @classmethod
    def client_ranks(cls, config: RunConfig) -> Callable[[int], int] | None:
        """Return a function from client id to rank; None if all ranks are equal."""
        return None

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Insert the trained parameters into a backbone, and return them.

        They are named as in the state, and do not include the head.
        """
        return {}

    def restore(self, backbone: Backbone) -> None:
        """Remove what `make` inserted, and restore the backbone bit for bit."""

    def attach(self, backbone: Backbone, base: BaseWeights | None = None) -> None:
        """Add the trained parameters to a resident backbone, without copying it.

        Parameters
        ----------
        backbone : Backbone
            The backbone with the base's weights.
        base : BaseWeights or None
            The base applied to it; None for W_0.
        """
        self.backbone, self._base = backbone, base
        self._head_before = {n: p.detach().clone() for n, p in backbone.head.items()}
        # The head comes last, so that a state reads adapter first in every phase.
        self._trained = {**self.make(backbone), **backbone.head}
        for parameter in self._trained.values():
            parameter.requires_grad_(True)

    def detach(self) -> None:
        """Restore the backbone to its state before `attach`, bit for bit."""
        for parameter in self._trained.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.restore(self.backbone)
        with torch.no_grad():
            for name, parameter in self.backbone.head.items():
                parameter.copy_(self._head_before[name])
        self._trained, self._head_before, self._base = {}, {}, None

    def begin(self, phase_round: int) -> None:
        """Prepare for a round of the phase, counted from 1."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser trains, in the order of `state`."""
        return [p for name, p in self._trained.items() if name not in self._idle]

    def uses(self) -> list[Use]:
        """Return where the trained parameters are used, for each example's gradient.

        Uses that are left out only make privacy of examples slow: gradients that these
        do not give in full are computed with a backward pass for each example.
        """
        return find_uses(self.backbone.model.modules(), self.parameters())

    def anchors(self) -> dict[str, Tensor]:
        """Return the values towards which weight decay pulls, by names of the state.

        Values with other names decay towards 0, as in torch's optimisers.
        """
        return {}

    def shapes(self) -> dict[str, torch.Size]:
        """Return the layout of a state: names and shapes in a stable order."""
        return {name: p.shape for name, p in self._trained.items()}

    def sent(self) -> dict[str, torch.Size]:
        """Return the layout of the part of a state that is sent to clients."""
        return self.shapes()

    def complete(self, sent: State) -> State:
        """Return the complete state, given the part that was sent."""
        return sent

    def returned(self) -> dict[str, torch.Size]:
        """Return the layout of the part that this round trains and clients return."""
        return {n: s for n, s in self.shapes().items() if n not in self._idle}

    def change_shapes(self, backbone: Backbone, values: int) -> dict[str, torch.Size]:
        """Return the layout of a change of the base that has this many values.

        Asked only of a phase that `changes_base`.
        """
        raise NotImplementedError

    def change(self, backbone: Backbone, change: State, phase_round: int) -> None:
        """Apply a round's change to the base; the adapter must be detached."""
        raise NotImplementedError

    def learned(
        self, state: State, rounds: int
    ) -> tuple[dict[str, NDArray[np.int64]], State]:
        """Return the entries that the phase has trained, if it `learns_delta`.

        The adapter must be attached.

        Parameters
        ----------
        state : State
            The state after the last round.
        rounds : int
            Number of rounds of the phase so far.

        Returns
        -------
        positions : dict[str, NDArray[np.int64]]
            Row-major positions in each target matrix, (k,).
        values : State
            The weights at these positions, (k,), float32.
        """
        raise NotImplementedError

    def base_change(self, state: State) -> State:
        """Return the change of the base that follows from a round's new state.

        Called only for a phase that `changes_base`.
        """
        sent = self.sent()
        return {name: tensor for name, tensor in state.items() if name not in sent}

    def whole(self, state: State) -> State:
        """Return a state completed by the frozen values that it omits."""
        return state

    def cut(self, state: State, rank: int) -> State:
        """Return the state for a client of a given rank, zero beyond that rank."""
        return state

    def state(self) -> State:
        """Return a copy of the trained values in a stable order, float32 on the CPU."""
        return {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self._trained.items()
        }

    def known(self) -> State:
        """Return the values that anyone with W_0 knows without a message.

        Call it right after `attach`. Randomly initialised values (the head, factors)
        are excluded, since their bits may depend on the machine.
        """
        return {n: t for n, t in self.state().items() if n not in self.backbone.head}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained values.

        Raises
        ------
        StateError
            If a name is missing or unknown, or a shape is wrong.
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
        """Make the backbone use the trained values; called after each change."""

    def fingerprint(self) -> str:
        """Return a digest of the layout, and of the mask if any; 32 hex digits."""
        layout = "\x1e".join(f"{n}\x1f{tuple(s)}" for n, s in self.shapes().items())
        return hashlib.blake2b(layout.encode(), digest_size=16).hexdigest()

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write a final state in a format that stock libraries load.

        If PEFT has no format for the adapter, the whole model is written. What stock
        libraries would load as another function is written so that they refuse it. The
        adapter must be attached.

        Parameters
        ----------
        folder : Path
            An empty folder.
        state : State
            The state of this adapter.
        base : BaseWeights or None
            The base that the adapter stands on.
        classes : list[str]
            The label names, in the order of class ids.
        leave : Callable
            Detaches the adapter and restores W_0.

        Returns
        -------
        Loading
            How it is loaded.
        """
        self.load(state)
        export_model(folder, self.backbone, classes)
        return WHOLE

    def merge(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write a final state as a whole model, which stock transformers loads.

        Parameters and result are those of `export`.

        Raises
        ------
        ConfigError
            If no such model computes what this adapter does.
        """
        if self.folder != "model":
            raise ConfigError(
                f"{type(self).__name__} has no merged form; allowed: its own export"
            )
        return self.export(folder, state, base, classes, leave)


def require_float32(config: RunConfig, why: str = "") -> None:
    """Raise ConfigError if the weights are not float32.

    Parameters
    ----------
    config : RunConfig
        The run.
    why : str
        The end of the error message, if the reason is not that weights are trained.
    """
    if config.model.dtype != "float32":
        why = why or (
            f" for {config.method}, whose updates bfloat16 weights would round away"
        )
        raise refuse("model.dtype", config.model.dtype, f"float32{why}")


def require_plain(config: RunConfig, why: str = "") -> None:
    """Raise ConfigError if weights are held in 8 or 4 bits; `why` is as above."""
    if config.model.quantize:
        why = why or f" for {config.method}, which trains these weights themselves"
        raise refuse("model.quantize", config.model.quantize, f"empty{why}")


def require_targets(config: RunConfig, backbone: Backbone) -> None:
    """Raise ConfigError if the backbone has no target matrices, or skips experts.

    A mixture's experts are arrays of all experts' weights, which no adapter on target
    matrices trains. Skipping them takes a `lora.targets` that names other layers.
    """
    if not backbone.targets:
        raise ConfigError(
            f"model.name is {config.model.name!r}, whose blocks hold no linear layers; "
            f"allowed for {config.method}: a model that has some, or method fft or head"
        )
    experts = expert_weights(backbone.model)
    if experts and config.lora.targets == "all-linear":
        raise ConfigError(
            f"lora.targets is 'all-linear', and no adapter trains the experts of model "
            f"{config.model.name!r} ({next(iter(experts))} and {len(experts) - 1} "
            f"more); allowed for {config.method}: names of other layers, such as "
            f"{_ends(backbone)}, or method fft"
        )


def _ends(backbone: Backbone) -> str:
    """Return how the names of target matrices end, with commas."""
    return ",".join(dict.fromkeys(n.rsplit(".", 1)[-1] for n in backbone.targets))
