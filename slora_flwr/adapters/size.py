"""How many values an adapter's state holds, without attaching it."""

from slora_flwr.adapters.masks import mask_size
from slora_flwr.config import RunConfig
from slora_flwr.models.backbone import Backbone


def state_size(name: str, config: RunConfig, backbone: Backbone) -> int:
    """Count the values that a client sends in a round.

    Parameters
    ----------
    name : str
        `full`, `head`, `sparse` or `lora`.
    config : RunConfig
        Density and rank.
    backbone : Backbone
        Shapes, whatever is attached.
    """
    head = sum(parameter.numel() for parameter in backbone.head.values())
    shapes = [module.weight.shape for module in backbone.targets.values()]
    if name == "full":
        return backbone.size
    if name == "sparse":
        density, structure = config.sparse.density, config.sparse.mask
        return head + sum(
            mask_size((out, into), density, structure) for out, into in shapes
        )
    if name == "lora":
        return head + sum(config.lora.rank * (out + into) for out, into in shapes)
    return head
