"""Full fine-tuning: all weights of the backbone, or only its biases."""

import torch
from torch import Tensor, nn

from slora_flwr.adapters.base import Adapter, require_float32, require_plain
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig


class FullAdapter(Adapter):
    """Train all weights; the state names them as the model does."""

    default_lr = 5e-4
    copies_weights = True

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError if the weights are not float32, or packed."""
        require_float32(config)
        require_plain(config)

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state."""
        return backbone.size

    @classmethod
    def kept_bytes(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the bytes of the copy of the trained weights."""
        # They are float32, as the head is.
        return 4 * cls.state_size(config, backbone)

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Return the weights themselves, after keeping a copy of them."""
        body = {
            name: parameter
            for name, parameter in backbone.model.named_parameters()
            if name not in backbone.head and self._trains(name)
        }
        self._before = {name: p.detach().clone() for name, p in body.items()}
        return body

    @classmethod
    def _trains(cls, name: str) -> bool:
        return True

    def restore(self, backbone: Backbone) -> None:
        """Restore the weights from their copies."""
        with torch.no_grad():
            for name, before in self._before.items():
                self._trained[name].copy_(before)
        self._before = {}


class BiasAdapter(FullAdapter):
    """Train all biases of the backbone: BitFit (arXiv 2106.10199)."""

    default_lr = 5e-3
    copies_weights = False

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError if the biases are not float32."""
        require_float32(config)

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state."""
        return backbone.head_size + sum(
            parameter.numel()
            for name, parameter in backbone.model.named_parameters()
            if name not in backbone.head and cls._trains(name)
        )

    @classmethod
    def _trains(cls, name: str) -> bool:
        return name.endswith(".bias")
