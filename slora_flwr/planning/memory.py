"""The memory that a training step needs, measured by one forward pass."""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RecipeConfig, RunConfig
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.training.loop import precision_of


@dataclass(frozen=True)
class Memory:
    """Bytes that a client's training step needs, by purpose.

    Attributes
    ----------
    weights : int
        The resident backbone.
    trained : int
        Trained values that the backbone does not hold, all gradients, and the
        optimiser's moments.
    activations : int
        What a forward pass of one full batch keeps for the backward pass.
    aside : int
        What the phase's base holds beside the weights, and the weights of W_0 that the
        phase changes, for restoring them.
    """

    weights: int
    trained: int
    activations: int
    aside: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.trained + self.activations + self.aside


def plan_memory(phase: Phase, config: RunConfig, backbone: Backbone) -> Memory:
    """Measure the memory that a training step of a phase needs.

    Parameters
    ----------
    phase : Phase
        A phase of the schedule.
    config : RunConfig
        The run.
    backbone : Backbone
        The backbone with W_0 and nothing attached, both before and after the call.
    """
    adapter = phase.adapter_type.from_config(config, phase.aggregator_type.trains)
    resident = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    adapter.attach(backbone)
    adapter.begin(1)
    parameters = adapter.parameters()
    trained = sum(parameter.numel() for parameter in parameters)
    beside = sum(
        parameter.numel()
        for parameter in parameters
        if parameter.untyped_storage().data_ptr() not in resident
    )
    # Adam has two moments, and SGD one with momentum.
    moments = 2 if phase.recipe.optimizer == "adamw" else phase.recipe.momentum > 0
    kept = _activation_bytes(backbone, phase.recipe, config.data.max_length)
    adapter.detach()
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    aside = _base_bytes(phase, config, backbone)
    if adapter.copies_weights:
        aside += weights
    elif phase.changes_base:
        aside += 4 * backbone.target_size
    return Memory(weights, 4 * (beside + (1 + moments) * trained), kept, aside)


def _base_bytes(phase: Phase, config: RunConfig, backbone: Backbone) -> int:
    """Return the bytes of the base from which a phase starts, 0 for W_0.

    It holds sparse values with their positions and the weights that they replace, and
    frozen factors.
    """
    earlier = takewhile(lambda other: other != phase, make_schedule(config))
    rounds_before = sum(other.rounds for other in earlier)
    shapes, positions, _ = phase.adapter_type.base_layout(
        phase, config, backbone, rounds_before
    )
    replaced = sum(
        len(at) * (at.itemsize + backbone.targets[name].weight.element_size())
        for name, at in positions.items()
    )
    return 4 * sum(math.prod(shape) for shape in shapes.values()) + replaced


def _activation_bytes(backbone: Backbone, recipe: RecipeConfig, length: int) -> int:
    """Return the bytes that a forward pass on a batch keeps, except weights."""
    model = backbone.model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = (recipe.most_rows(length), length)
    ids = torch.ones(size, dtype=torch.long, device=backbone.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, precision_of(backbone, recipe.precision):
        # Held until counted, since new storages could reuse the address of freed ones.
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    del kept
    return sum(storages.values())
