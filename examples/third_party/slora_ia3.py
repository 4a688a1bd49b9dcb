"""(IA)^3 trained with FedExP: a method for slora-flwr from outside of it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from peft import IA3Config
from torch import Tensor, nn

from slora_flwr import (
    Adapter,
    Aggregator,
    Backbone,
    BaseWeights,
    Loading,
    Mean,
    Method,
    PhaseRow,
    RunConfig,
    Stack,
    State,
    require_targets,
    wrap_peft,
    write_peft,
)

METHOD = Method(
    phases=(PhaseRow(adapter="ia3", aggregator="fedexp"),),
    help="vectors that scale activations, with a server step of adaptive length",
    paper="arXiv 2205.05638",
)


class IA3Adapter(Adapter):
    """Train a vector for each target matrix: (IA)^3 (arXiv 2205.05638).

    A vector scales the matrix's output, l * (W x + b). Where a matrix narrows, as a
    block's last does, it scales the input, W (l * x) + b: the paper's l_ff. All vectors
    start at one, so that an untrained adapter changes nothing. With `lora.targets =
    "key,value,output.dense"` they are where PEFT puts them in BERT.

    The state holds `<module>.ia3_l`, shape (out, 1) or (1, in), as PEFT does.
    """

    default_lr = 1e-2
    folder = "adapter"

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Refuse a backbone without target matrices."""
        require_targets(config, backbone)

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values of the head and of all vectors."""
        vectors = (
            module.in_features if _narrows(module) else module.out_features
            for module in backbone.targets.values()
        )
        return backbone.head_size + sum(vectors)

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Put PEFT's layers in; return their vectors."""
        self._model = wrap_peft(backbone.model, _peft_config(backbone))
        return {
            f"{name}.ia3_l": backbone.model.get_submodule(name).ia3_l["default"]
            for name in backbone.targets
        }

    def restore(self, backbone: Backbone) -> None:
        """Take PEFT's layers out."""
        self._model.unload()
        del self._model

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write the vectors and the head in PEFT's format."""
        backbone = self.backbone
        leave()
        vectors = {
            f"{name}.ia3_l.default": state[f"{name}.ia3_l"] for name in backbone.targets
        }
        return write_peft(folder, backbone, _peft_config(backbone), state, vectors)


def _peft_config(backbone: Backbone) -> IA3Config:
    modules = backbone.targets.items()
    return IA3Config(
        target_modules=[name for name, _ in modules],
        feedforward_modules=[name for name, module in modules if _narrows(module)],
    )


def _narrows(module: nn.Linear) -> bool:
    return module.in_features > module.out_features


class FedExP(Aggregator):
    """Lengthen the server's step where clients disagree: FedExP (arXiv 2301.09604).

    The step is the mean update times max(1, mean(|update|^2) / (2 |mean update|^2)),
    both means weighted by examples. It needs each client's norm, which a running sum
    does not keep, so the updates are kept apart.
    """

    fold = Stack

    def combine(self, fold: Mean) -> State:
        """Return the mean update, lengthened."""
        stack, mean = Stack.of(fold), fold.result()
        squares = [
            weight * _square(update)
            for weight, update in zip(stack.weights(), stack.updates(), strict=True)
        ]
        together = 2 * fold.weight * _square(mean)
        length = max(1.0, sum(squares) / together) if together else 1.0
        return {name: tensor * length for name, tensor in mean.items()}


def _square(update: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in update.values())
