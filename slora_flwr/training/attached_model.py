"""A process's resident backbone, with a phase's adapter attached over its base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.handoff import Handoff
from slora_flwr.backbone.base_weights import BaseWeights, entries_of, take_entries
from slora_flwr.backbone.families import most_positions
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.backbone.quantised import weight_of
from slora_flwr.common.memory import return_freed
from slora_flwr.common.svd import truncated_svd
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig, refuse
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.precision import precision_of
from slora_flwr.training.process_data import ProcessData


class AttachedModel:
    """A backbone, loaded when first used, and the adapter attached to it.

    Parameters
    ----------
    config : RunConfig
        The run.
    data : ProcessData
        Source of the tokeniser and of the head's number of classes.

    Attributes
    ----------
    reference : State
        Values of the phase's states that both sides already know.
    """

    def __init__(self, config: RunConfig, data: ProcessData) -> None:
        self._config, self._data = config, data
        self._adapter: Adapter | None = None
        self._base: BaseWeights | None = None
        self._changes = False  # whether rounds change the base
        self._attached: tuple[Phase, str] | None = None
        self.reference: State = {}

    @cached_property
    def backbone(self) -> Backbone:
        """The resident backbone."""
        config, data = self._config, self._data
        task = find_task(config)
        backbone = load_backbone(
            config.model,
            task.outputs(data.classes),
            config.seed,
            config.lora.targets,
            data.tokenizer,
            task,
        )
        check_fit(config, backbone)
        return backbone

    @property
    def digest(self) -> str:
        """W_0's digest, for which any adapter is detached the first time."""
        if "digest" not in vars(self.backbone):
            self.detach()
        return self.backbone.digest

    @property
    def adapter(self) -> Adapter:
        """The adapter attached."""
        assert self._adapter is not None, "no adapter is attached"
        return self._adapter

    def attach(
        self, phase: Phase, base: BaseWeights | None = None, digest: str = ""
    ) -> Adapter:
        """Attach a phase's adapter over its base, unless it is attached already.

        Parameters
        ----------
        phase : Phase
            A phase of the schedule.
        base : BaseWeights or None
            The base; None for W_0.
        digest : str
            Digest of the base; empty for W_0.
        """
        if not self.is_attached(phase, digest):
            self.detach()
            if base is None and phase.changes_base:
                base = BaseWeights()  # keeps W_0 aside
            frozen: State = {}
            if base is not None:
                frozen = base.apply(self.backbone, changes=phase.changes_base)
                self._base, self._changes = base, phase.changes_base
            self._adapter = phase.adapter_type.from_config(
                self._config, phase.aggregator_type.trains, frozen
            )
            self._adapter.attach(self.backbone, self._base)
            self._attached = (phase, digest)
            self.reference = {}
            if self._config.download.dtype != "float32":
                self.reference = self._known(phase, base)
        return self.adapter

    def is_attached(self, phase: Phase, digest: str) -> bool:
        """Return whether the phase's adapter is attached over the base of a digest."""
        return self._attached == (phase, digest)

    def detach(self) -> None:
        """Detach the adapter and restore W_0 in the backbone."""
        if self._adapter is not None:
            self._adapter.detach()
        if self._base is not None:
            self._base.remove(self.backbone)
        self._adapter, self._base, self._attached = None, None, None
        return_freed()

    def change_base(self, changes: Sequence[State], first: int, digest: str) -> None:
        """Change the base under the attached adapter.

        Parameters
        ----------
        changes : Sequence[State]
            The changes of successive rounds of the phase.
        first : int
            The round within the phase of the first change.
        digest : str
            Digest of the changed base.
        """
        assert self._attached is not None
        phase, self._attached = self._attached[0], None  # until it is whole again
        self.adapter.detach()
        for number, change in enumerate(changes, start=first):
            self.adapter.change(self.backbone, change, number)
        self.adapter.attach(self.backbone, self._base)
        self._attached = (phase, digest)

    @contextmanager
    def exchanged(self, weights: State) -> Iterator[None]:
        """Exchange the base under the attached adapter for other target matrices.

        Parameters
        ----------
        weights : State
            The target matrices, float32; empty to keep the base. Meanwhile it holds
            those of the base. The adapter may be detached meanwhile, for good.
        """
        if not weights:
            yield
            return
        self._exchange(weights)
        try:
            yield
        finally:
            if self._adapter is not None:
                self._exchange(weights)

    def _exchange(self, weights: State) -> None:
        self.adapter.detach()
        with torch.no_grad():
            for name, weight in self.target_weights.items():
                before = weight.to("cpu", copy=True)
                weight.copy_(weights[name])
                weights[name] = before
        self.adapter.attach(self.backbone, self._base)

    def change_shapes(self, values: int) -> dict[str, torch.Size]:
        """Return the layout of a base change with a given number of values."""
        return self.adapter.change_shapes(self.backbone, values)

    @property
    def target_weights(self) -> dict[str, Tensor]:
        """The base's target matrices, resident."""
        return {n: m.weight.detach() for n, m in self.backbone.targets.items()}

    @property
    def target_shapes(self) -> dict[str, torch.Size]:
        """The layout of the base's target matrices."""
        return {
            name: torch.Size([m.out_features, m.in_features])
            for name, m in self.backbone.targets.items()
        }

    def base_weights(self) -> State:
        """Return a copy of the base's target matrices, float32 on the CPU."""
        with self._without_adapter():
            return {
                name: weight_of(module).to("cpu", torch.float32, copy=True)
                for name, module in self.backbone.targets.items()
            }

    def first_values(self, positions: Mapping[str, NDArray[np.int64]]) -> State:
        """Return W_0's values at positions of target matrices, by matrix."""
        with self._without_adapter():
            base, whole = self._base, {}
            if base is not None and self._changes:
                whole = base.before
            elif base is not None:
                base.remove(self.backbone)
            targets = self.backbone.targets
            found = {
                name: take_entries(whole[name], at)
                if name in whole
                else entries_of(targets[name], at)
                for name, at in positions.items()
            }
            if base is not None and not whole:
                base.apply(self.backbone)
        return found

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Detach the adapter for a while. What it has loaded is lost."""
        if self._adapter is not None:
            self._adapter.detach()
        yield
        if self._adapter is not None:
            self._adapter.attach(self.backbone, self._base)

    def hand_over(self, state: State, rounds: int, phase: Phase) -> Handoff:
        """Return the handoff from the attached sparse phase after `rounds` rounds.

        No adapter is attached afterwards.
        """
        positions, values = self.adapter.learned(state, rounds)
        self.detach()
        head = {name: state[name] for name in self.backbone.head}
        trains = phase.aggregator_type.trains
        primed: Handoff = phase.adapter_type.prime(
            self._config, trains, self.backbone, positions, values, head
        )
        return primed

    def kept_energy(self, state: State, rounds: int, rank: int) -> float:
        """Return the share of the learned deltas' energy that a rank would keep now.

        It is the mean over the target matrices, as the handoff reports it.
        """
        positions, values = self.adapter.learned(state, rounds)
        first = self.first_values(positions)
        energies = []
        for name, module in self.backbone.targets.items():
            delta = (values[name] - first[name]).double().numpy()
            shape = (module.out_features, module.in_features)
            energies.append(truncated_svd(positions[name], delta, shape, rank).energy)
        return fmean(energies)

    def _known(self, phase: Phase, base: BaseWeights | None) -> State:
        """Return the known values of states: W_0's, and the factors of the base."""
        known = self.adapter.known()
        # A base that changes may have been sent without its initial factors.
        if base is not None and not phase.changes_base:
            shapes = self.adapter.shapes()
            known |= {n: t for n, t in base.factors().items() if n in shapes}
        return known


def check_fit(config: RunConfig, backbone: Backbone) -> None:
    """Raise ConfigError for what this backbone cannot do, before any training."""
    most = most_positions(backbone.model)
    if most is not None and config.data.max_length > most:
        allowed = f"4 to {most}, the positions of model {config.model.name!r}"
        raise refuse("data.max-length", config.data.max_length, allowed)
    token = int(backbone.tokenizer.pad_token_id == 0)  # any but padding
    precision = precision_of(backbone, config.train.precision)
    try:  # Other tables of positions show only when they are read.
        with torch.inference_mode(), backbone.computing(), precision:
            ids = torch.full((1, config.data.max_length), token, device=backbone.device)
            backbone.task.run(backbone.model, ids, torch.ones_like(ids))
    except (IndexError, RuntimeError) as error:
        allowed = f"the length of texts that model {config.model.name!r} reads"
        given = config.data.max_length
        raise refuse("data.max-length", given, f"{allowed} ({error})") from error
    why = ""
    if backbone.outline is None:  # which has no numbers to compare
        with torch.inference_mode(), precision_of(backbone, config.train.precision):
            why = backbone.task.misfit(backbone.model)
    if why:
        allowed = f"a model that task {config.task} can use, but {why}"
        raise refuse("model.name", config.model.name, allowed)
    can_checkpoint = backbone.model.supports_gradient_checkpointing
    if config.train.checkpointing and not can_checkpoint:
        allowed = f"false, since model {config.model.name!r} does without"
        raise refuse("train.checkpointing", True, allowed)
    for phase in make_schedule(config):
        rate = phase.recipe.head_lr
        if rate != phase.recipe.lr and not backbone.head:
            section = phase.adapter_type.section
            own = section and getattr(config, section).head_lr
            key = f"{section if own else 'train'}.head-lr"
            allowed = f"0, since model {config.model.name!r} has no classifier's head"
            raise refuse(key, rate, allowed)
        phase.adapter_type.check_fit(config, backbone)
        if not phase.adapter_type.state_size(config, backbone):
            allowed = (
                f"a method that trains some weights of model {config.model.name!r}"
            )
            allowed += f", where the {phase.adapter} phase finds none for {config.task}"
            raise refuse("method", config.method, allowed)
