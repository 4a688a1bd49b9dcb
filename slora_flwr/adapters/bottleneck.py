"""Bottleneck adapters, placed as in two papers.

`houlsby` (arXiv 1902.00751) puts two in each block, on the outputs of attention and
feed-forward, before the residual is added. The block's normalisations are trained too.
`pfeiffer` (arXiv 2005.00247) puts one in each block, on the residual path into the last
normalisation: y = norm(x + up(relu(down(norm(x))))).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.hooks import RemovableHandle

from slora_flwr.adapters.base import Adapter, require_float32
from slora_flwr.adapters.loading import BOTTLENECKS, Loading
from slora_flwr.adapters.model_files import export_model
from slora_flwr.adapters.per_example import Use, find_uses
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, block_modules
from slora_flwr.common.tensors import State, save_tensors
from slora_flwr.config import ConfigError, RunConfig

BOTTLENECK_FILE = "bottlenecks.safetensors"
REST_FILE = "without_bottlenecks.safetensors"

# Endings of module names in BERT, RoBERTa and DeBERTa; in DistilBERT; and in ALBERT.
_ATTENTION = (".attention.output.dropout", ".attention.out_lin", ".output_dropout")
_FEED_FORWARD = (".output.dropout", ".ffn.dropout", ".ffn_output")
_LAST_NORM = (".output.LayerNorm", ".output_layer_norm", ".full_layer_layer_norm")

# Both papers initialise the adapters near the identity.
INITIAL_DEVIATION = 1e-3


class Bottleneck(nn.Module):
    """up(f(down(x))), from `width` features to `inner` and back, in float32."""

    def __init__(self, width: int, inner: int, relu: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self._between = F.relu if relu else F.gelu
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value to add to x."""
        return self.up(self._between(self.down(x.float()))).to(x.dtype)


class BottleneckAdapter(Adapter):
    """Train bottlenecks between the frozen layers of each block.

    The state holds, for each bottleneck, `<module>.down.weight`, shape (inner, width),
    `.down.bias`, `.up.weight` and `.up.bias`; for `houlsby` also the weights and biases
    of the normalisations.

    Parameters
    ----------
    reduction : int
        The model's width divided by the bottleneck's.
    """

    default_lr = 2e-3
    section = "bottleneck"
    kind: ClassVar[str]
    trains_norms: ClassVar[bool]

    def __init__(self, reduction: int) -> None:
        super().__init__()
        self._reduction = reduction

    @classmethod
    def from_config(
        cls, config: RunConfig, trains: str = "both", frozen: State | None = None
    ) -> Self:
        """Return a detached adapter, built from a run config."""
        return cls(config.bottleneck.reduction)

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Raise ConfigError if the backbone's blocks are of no known family."""
        find_places(backbone.model, cls.kind)

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state."""
        width, inner = bottleneck_shape(backbone.model, config.bottleneck.reduction)
        places = len(find_places(backbone.model, cls.kind))
        norms = cls._find_norms(backbone).values()
        return (
            backbone.head_size
            + places * (2 * width * inner + width + inner)
            + sum(parameter.numel() for parameter in norms)
        )

    def known(self) -> State:
        """Return the normalisations; bottlenecks start at random."""
        return {name: t for name, t in self.state().items() if name in self._norms}

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write the whole model, with the bottlenecks in a separate file.

        transformers would load the rest and say nothing of them, so that has a name
        under which it finds no weights.
        """
        self.load(state)
        export_model(folder, self.backbone, classes)
        (folder / "model.safetensors").rename(folder / REST_FILE)
        export_bottlenecks(folder, state, self.kind, self._reduction)
        return BOTTLENECKS[self.kind]

    def merge(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Raise ConfigError: bottlenecks are layers that the model does not have."""
        raise ConfigError(
            "bottlenecks are layers of their own, which no model of transformers has; "
            "allowed: the export that is not merged"
        )

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Insert the bottlenecks, and return them with the normalisations."""
        trained, self._inserted, self._hooks = insert(
            backbone.model, self.kind, self._reduction
        )
        norms = self._find_norms(backbone)
        self._norms = {name: (p, p.detach().clone()) for name, p in norms.items()}
        return trained | norms

    def uses(self) -> list[Use]:
        """Return the uses of the bottlenecks, the normalisations and the head."""
        layers = [layer for module in self._inserted for layer in module.modules()]
        return super().uses() + find_uses(layers, self.parameters())

    def restore(self, backbone: Backbone) -> None:
        """Remove the bottlenecks and restore the normalisations."""
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for parameter, before in self._norms.values():
                parameter.copy_(before)
        self._inserted, self._hooks, self._norms = [], [], {}

    @classmethod
    def _find_norms(cls, backbone: Backbone) -> dict[str, nn.Parameter]:
        return find_norms(backbone.model) if cls.trains_norms else {}


class HoulsbyAdapter(BottleneckAdapter):
    """Train two bottlenecks and the normalisations per block (arXiv 1902.00751)."""

    kind = "houlsby"
    trains_norms = True

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError if the normalisations' weights are not float32."""
        require_float32(config)


class PfeifferAdapter(BottleneckAdapter):
    """Train one bottleneck per block (arXiv 2005.00247)."""

    kind = "pfeiffer"
    trains_norms = False


def insert(
    model: Any, kind: str, reduction: int
) -> tuple[dict[str, nn.Parameter], list[Bottleneck], list[RemovableHandle]]:
    """Insert bottlenecks into a model.

    Returns
    -------
    dict
        Their parameters, named by the module and `down.weight`, `down.bias`,
        `up.weight` or `up.bias`.
    list
        The bottlenecks.
    list
        A handle per bottleneck that removes it.
    """
    parameters, inserted, hooks = {}, [], []
    device = next(model.parameters()).device
    width, inner = bottleneck_shape(model, reduction)
    for name, module in find_places(model, kind).items():
        bottleneck = Bottleneck(width, inner, relu=kind == "pfeiffer").to(device)
        inserted.append(bottleneck)
        hook = _after if kind == "houlsby" else _around
        hooks.append(module.register_forward_hook(partial(hook, bottleneck)))
        for part, parameter in bottleneck.named_parameters():
            parameters[f"{name}.{part}"] = parameter
    return parameters, inserted, hooks


def bottleneck_shape(model: Any, reduction: int) -> tuple[int, int]:
    """Return a bottleneck's outer and inner width."""
    width = int(model.config.hidden_size)
    return width, max(1, width // reduction)


def find_places(model: Any, kind: str) -> dict[str, nn.Module]:
    """Return the modules whose output a bottleneck changes, by name.

    Raises
    ------
    ConfigError
        If the model's blocks are of an unknown family.
    """
    ends = (*_ATTENTION, *_FEED_FORWARD) if kind == "houlsby" else _LAST_NORM
    found = {
        name: module
        for name, module in block_modules(model).items()
        if name.endswith(ends) and (kind == "houlsby" or ".attention." not in name)
    }
    if not found:
        raise ConfigError(
            f"method is {kind!r}, which does not know the blocks of "
            f"{type(model).__name__}; allowed: a BERT, RoBERTa, DeBERTa, DistilBERT or "
            "ALBERT, or another method"
        )
    return found


def find_norms(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights and biases of the blocks' normalisations, by name."""
    return {
        f"{name}.{part}": parameter
        for name, module in block_modules(model).items()
        if isinstance(module, nn.LayerNorm)
        for part, parameter in module.named_parameters()
    }


def _after(
    bottleneck: Bottleneck, module: nn.Module, given: tuple[Tensor], out: Tensor
) -> Tensor:
    return out + bottleneck(out)


def _around(
    bottleneck: Bottleneck, norm: nn.Module, given: tuple[Tensor], out: Tensor
) -> Tensor:
    # The module's own forward: calling it would call this hook again.
    return norm.forward(given[0] + bottleneck(out))


def export_bottlenecks(folder: Path, state: State, kind: str, reduction: int) -> None:
    """Write a state's bottlenecks into the folder of the exported model."""
    arrays = {n: t for n, t in state.items() if ".down." in n or ".up." in n}
    facts = {"kind": kind, "reduction": str(reduction)}
    save_tensors(arrays, folder / BOTTLENECK_FILE, facts)


def apply_bottlenecks(model: nn.Module, path: Path) -> None:
    """Insert exported bottlenecks into the exported model.

    Parameters
    ----------
    model : nn.Module
        The model of the same folder, with what `without_bottlenecks.safetensors` holds.
    path : Path
        Path of `bottlenecks.safetensors`.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        facts = file.metadata()
        parameters, _, _ = insert(model, facts["kind"], int(facts["reduction"]))
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))
