"""The memory that a training step needs, measured by one forward pass of shapes."""

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from slora_flwr.backbone.load import Backbone, find_blocks, find_targets
from slora_flwr.config import RecipeConfig, RunConfig
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.training.precision import precision_of


@dataclass(frozen=True)
class Memory:
    """Bytes that a client's training step needs, by purpose.

    Attributes
    ----------
    weights : int
        The resident backbone.
    aside : int
        What the phase's base holds beside the weights, and what the adapter and the
        base hold for restoring W_0.
    trained : int
        Trained values that the backbone does not hold.
    moments : int
        The optimiser's moments.
    state : int
        The state that the client was sent, from which its update is taken.
    gradients : int
        Gradients of all trained values.
    added : int
        Gradients that are made before they are added to others. Only those of weights
        that are used twice, or that an earlier part of the batch has left gradients of,
        are added at all; autograd keeps the sum of a weight's uses apart from both.
    kept : int
        Gradients that earlier parts of the batch have left, as the next part is read.
    activations : int
        What a forward pass of the largest part of a batch keeps for the backward pass.
    again : int
        With checkpointing, what one block keeps as it is computed again, after the
        loss.
    outputs : int
        Logits that the loss holds at a time, with their gradients and those of the
        output weights.
    unpacked : int
        The largest of the packed weights, unpacked to compute with it.
    """

    weights: int
    aside: int
    trained: int
    moments: int
    state: int
    gradients: int
    added: int
    kept: int
    activations: int
    again: int
    outputs: int
    unpacked: int

    @property
    def total(self) -> int:
        """The peak: at the loss, or at the beginning or end of the backward pass.

        Activations are freed as gradients are made.
        """
        lasting = self.weights + self.aside + self.trained + self.moments + self.state
        begun = self.kept + self.activations + max(self.outputs, self.again)
        return lasting + max(begun, self.gradients + self.added) + self.unpacked


def plan_memory(phase: Phase, config: RunConfig, backbone: Backbone) -> Memory:
    """Measure the memory that a training step of a phase needs.

    Parameters
    ----------
    phase : Phase
        A phase of the schedule.
    config : RunConfig
        The run.
    backbone : Backbone
        The backbone with W_0 and nothing attached, both before and after the call. An
        outline will do, and takes no memory itself.
    """
    with backbone.computing():
        adapter = phase.adapter_type.from_config(config, phase.aggregator_type.trains)
        resident = {_place(p) for p in backbone.model.parameters()}
        adapter.attach(backbone)
        adapter.begin(1)
        parameters: list[nn.Parameter] = adapter.parameters()
        sizes = [parameter.numel() for parameter in parameters]
        beside = sum(p.numel() for p in parameters if _place(p) not in resident)
        length = config.data.max_length
        activations, again = _activation_bytes(backbone, phase.recipe, length)
        rows = phase.recipe.most_rows(length)
        outputs = backbone.task.output_bytes(backbone.model, rows * length)
        twice = 4 * _size_of_tied(backbone.model)
        adapter.detach()
    # Adam has two moments, and SGD one with momentum.
    moments = 2 if phase.recipe.optimizer == "adamw" else phase.recipe.momentum > 0
    gradients = 4 * sum(sizes)
    in_parts = rows < phase.recipe.batch_size
    largest = 4 * max(sizes, default=0)
    apart = 0
    if config.privacy.of_examples:
        # Each example's gradients, one parameter's in float64 too, and the noised sum.
        apart = rows * (gradients + 2 * largest) + 2 * gradients
    return Memory(
        weights=backbone.weight_bytes,
        aside=_aside_bytes(phase, config, backbone),
        trained=4 * beside,
        moments=4 * moments * sum(sizes),
        state=4 * phase.adapter_type.state_size(config, backbone),
        gradients=gradients,
        added=(max(3 * twice, largest) if in_parts else 2 * twice) + apart,
        kept=gradients if in_parts else 0,
        activations=activations,
        again=again,
        outputs=outputs,
        unpacked=_unpacked_bytes(config, backbone),
    )


def _size_of_tied(model: Any) -> int:
    """Return the size of a trained weight that is both input and output embedding."""
    outputs = model.get_output_embeddings()
    if outputs is None or outputs.weight is not model.get_input_embeddings().weight:
        return 0
    return outputs.weight.numel() if outputs.weight.requires_grad else 0


def _aside_bytes(phase: Phase, config: RunConfig, backbone: Backbone) -> int:
    """Return the bytes of a phase's base, and of what restores W_0.

    A base holds sparse values with their positions and the weights that they replace,
    and frozen factors.
    """
    earlier = takewhile(lambda other: other != phase, make_schedule(config))
    rounds_before = sum(other.rounds for other in earlier)
    shapes, positions, _ = phase.adapter_type.base_layout(
        phase, config, backbone, rounds_before
    )
    # A sparse term compares in float32, and holds the positions by row too.
    width = 4 + 12 if backbone.quantize else backbone.dtype.itemsize
    replaced = sum(len(at) * (at.itemsize + width) for at in positions.values())
    base = 4 * sum(math.prod(shape) for shape in shapes.values()) + replaced
    if phase.changes_base:
        base += 4 * backbone.target_size
    kept: int = phase.adapter_type.kept_bytes(config, backbone)
    return base + kept


def _unpacked_bytes(config: RunConfig, backbone: Backbone) -> int:
    """Return the bytes of the largest packed weight, unpacked."""
    if not config.model.quantize:
        return 0
    width = backbone.dtype.itemsize
    linear = find_targets(backbone.model).values()
    return max((width * m.out_features * m.in_features for m in linear), default=0)


def _activation_bytes(
    backbone: Backbone, recipe: RecipeConfig, length: int
) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps, except weights, and one block again.

    With checkpointing the pass keeps the inputs of all blocks, and what is kept outside
    of blocks; the second figure is 0 without.
    """
    model = backbone.model.train()
    own = {_place(p) for p in model.parameters()}
    # By place; what is kept outside of blocks, then in each pass through a block.
    kept: list[dict[int, int]] = [{}]
    inputs: list[int] = []
    found: set[int] = set()
    where = 0

    def keep(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in own and place not in found:
            found.add(place)
            kept[where][place] = tensor.untyped_storage().nbytes()
        return tensor

    def enter(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal where
        where = len(kept)
        kept.append({})
        read = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
        inputs.append(read[0].numel() * read[0].element_size())

    def leave(*_: object) -> None:
        nonlocal where
        where = 0

    blocks = find_blocks(model)
    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    size = (recipe.most_rows(length), length)
    ids = torch.ones(size, dtype=torch.long, device=backbone.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, precision_of(backbone, recipe.precision):
        # Held until counted, since new storages could reuse the place of freed ones.
        out = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    del out
    for handle in handles:
        handle.remove()
    outside, *passes = (sum(part.values()) for part in kept)
    if recipe.checkpointing:
        return outside + sum(inputs), max(passes, default=0)
    return outside + sum(passes), 0


def _place(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others that exist."""
    place: Any = tensor.untyped_storage()._cdata
    return int(place)
