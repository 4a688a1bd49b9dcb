"""How many values an adapter's state holds, without attaching it."""

from slora_flwr.adapters.bottleneck import (
    KINDS,
    bottleneck_shape,
    find_norms,
    find_places,
)
from slora_flwr.adapters.masks import deal_densities, mask_size
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import Phase


def state_size(name: str, config: RunConfig, backbone: Backbone) -> int:
    """Count the values of an adapter's state, A and B both for `lora`.

    Parameters
    ----------
    name : str
        A phase's adapter.
    config : RunConfig
        Density, rank, reduction.
    backbone : Backbone
        Shapes, whatever is attached.
    """
    head = backbone.head_size
    targets = backbone.targets
    if name == "full":
        return backbone.size
    if name == "sparse":
        sparse = config.sparse
        named = {name: (m.out_features, m.in_features) for name, m in targets.items()}
        densities = deal_densities(named, sparse.density, sparse.budget)
        return head + sum(
            mask_size(shape, densities[name], sparse.mask)
            for name, shape in named.items()
        )
    if name == "lora":
        return head + factors_size(config.lora.rank, backbone)
    if name == "bias":
        return head + sum(
            parameter.numel()
            for key, parameter in backbone.model.named_parameters()
            if key.endswith(".bias") and key not in backbone.head
        )
    if name in KINDS:
        width, inner = bottleneck_shape(backbone.model, config.bottleneck.reduction)
        norms = find_norms(backbone.model).values() if name == "houlsby" else ()
        places = len(find_places(backbone.model, name))
        return (
            head
            + places * (2 * width * inner + width + inner)
            + sum(parameter.numel() for parameter in norms)
        )
    return head


def traffic(
    phase: Phase, config: RunConfig, backbone: Backbone, phase_round: int, rank: int
) -> tuple[int, int]:
    """Count the values that a client is sent in a round, its base apart, and returns.

    Parameters
    ----------
    phase : Phase
        One of the schedule's.
    config, backbone
        As of `state_size`.
    phase_round : int
        The round within the phase, from 1.
    rank : int
        The client's, for `lora`.

    Returns
    -------
    tuple of int
        Down and up.
    """
    whole = state_size(phase.adapter, config, backbone)
    head = state_size("head", config, backbone)
    if phase.adapter == "lora":
        modules = backbone.targets.values()
        a = rank * sum(module.in_features for module in modules)
        b = rank * sum(module.out_features for module in modules)
        both, odd = a + b + head, phase_round % 2
        if phase.aggregator == "ffa":
            return b + head, b + head
        if phase.aggregator == "alternate":
            return both, head + (b if odd else a)
        return both, both
    if phase.adapter == "sparse" and phase.moves_base:
        return head, whole
    return whole, whole


def targets_size(backbone: Backbone) -> int:
    """Count the values of all target matrices."""
    return sum(module.weight.numel() for module in backbone.targets.values())


def factors_size(rank: int, backbone: Backbone) -> int:
    """Count the values of all target matrices' A and B of a rank."""
    modules = backbone.targets.values()
    return rank * sum(module.out_features + module.in_features for module in modules)
