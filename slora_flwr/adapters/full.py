"""Full fine-tuning: every weight of the backbone."""

import torch
from torch import Tensor, nn

from slora_flwr.adapters.base import HeadAdapter
from slora_flwr.backbone.load import Backbone


class FullAdapter(HeadAdapter):
    """Train all weights; the state holds them by their names in the model."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        body = {
            name: parameter
            for name, parameter in backbone.model.named_parameters()
            if name not in backbone.head and self._trains(name)
        }
        self._before = {name: p.detach().clone() for name, p in body.items()}
        return body

    def _trains(self, name: str) -> bool:
        return True

    def _restore(self, backbone: Backbone) -> None:
        with torch.no_grad():
            for name, before in self._before.items():
                self._trained[name].copy_(before)
        self._before = {}
