"""Full fine-tuning: every weight of the backbone."""

import torch
from torch import Tensor, nn

from slora_flwr.adapters.head import HeadAdapter
from slora_flwr.models.backbone import Backbone


class FullAdapter(HeadAdapter):
    """Train all weights, or the target matrices alone.

    Parameters
    ----------
    targets_only : bool
        True to leave embeddings, biases and norms frozen.
    """

    def __init__(self, *, targets_only: bool = False) -> None:
        super().__init__()
        self._targets_only = targets_only
        self._before: dict[str, Tensor] = {}

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        wanted = dict(backbone.model.named_parameters())
        if self._targets_only:
            wanted = {f"{n}.weight": wanted[f"{n}.weight"] for n in backbone.targets}
        body = {n: p for n, p in wanted.items() if n not in backbone.head}
        self._before = {name: p.detach().clone() for name, p in body.items()}
        return body

    def _restore(self, backbone: Backbone) -> None:
        with torch.no_grad():
            for name, before in self._before.items():
                self._trained[name].copy_(before)
        self._before = {}
