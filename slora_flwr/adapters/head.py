"""The adapter that trains only the head."""

from slora_flwr.adapters.base import Adapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig


class HeadAdapter(Adapter):
    """Train only the head."""

    default_lr = 5e-3
    is_head = True

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state."""
        return backbone.head_size
