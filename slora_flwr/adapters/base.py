"""The head alone; and what every adapter shares, since all of them train the head."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State


class StateError(ValueError):
    """A state that does not fit the adapter it is meant for."""


class HeadAdapter:
    """Train the head and nothing else; the base of the other adapters.

    A subclass overrides `_make` to add trained parameters of its own and `_restore` to
    take them out again.
    """

    def __init__(self) -> None:
        self._trained: dict[str, nn.Parameter] = {}
        # Names in the state that this round does not train.
        self._idle: set[str] = set()
        self._head_before: State = {}

    def attach(self, backbone: Backbone) -> None:
        """Make the trained parameters on a resident backbone; copies no backbone."""
        self.backbone = backbone
        self._head_before = {n: p.detach().clone() for n, p in backbone.head.items()}
        # The head comes last, so that a state reads adapter first in every phase.
        self._trained = {**self._make(backbone), **backbone.head}
        for parameter in self._trained.values():
            parameter.requires_grad_(True)

    def detach(self) -> None:
        """Leave the backbone as it was before `attach`, bit for bit."""
        for parameter in self._trained.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._restore(self.backbone)
        with torch.no_grad():
            for name, parameter in self.backbone.head.items():
                parameter.copy_(self._head_before[name])
        self._trained, self._head_before = {}, {}

    def begin(self, phase_round: int) -> None:
        """Make ready for a round of the phase, from 1; most train alike in all."""

    def parameters(self) -> list[nn.Parameter]:
        """List what the optimiser trains, in the order of `state`."""
        return [p for name, p in self._trained.items() if name not in self._idle]

    def shapes(self) -> dict[str, torch.Size]:
        """Give the layout of a state: names and shapes in their stable order."""
        return {name: p.shape for name, p in self._trained.items()}

    def sent(self) -> dict[str, torch.Size]:
        """Give the layout of what a client is sent of a state."""
        return self.shapes()

    def complete(self, sent: State) -> State:
        """Make a whole state of what a client was sent."""
        return sent

    def returned(self) -> dict[str, torch.Size]:
        """Give the layout of what a client returns: the part that this round trains."""
        return {n: s for n, s in self.shapes().items() if n not in self._idle}

    def move_shapes(self, backbone: Backbone, rank: int) -> dict[str, torch.Size]:
        """Give the layout of a round's change of the base, where the phase has one."""
        raise NotImplementedError

    def move(self, backbone: Backbone, move: State, phase_round: int) -> None:
        """Change the base as a round of the phase did, while detached."""
        raise NotImplementedError

    def state(self) -> State:
        """Copy the trained values, float32 on the CPU, in their stable order."""
        return {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self._trained.items()
        }

    def known(self) -> State:
        """Copy the values that whoever has W_0 knows without a message.

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

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        return {}

    def _restore(self, backbone: Backbone) -> None:
        pass
