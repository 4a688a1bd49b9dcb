"""Low-rank adaptation through PEFT's LoRA layers."""

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from slora_flwr.adapters.head import HeadAdapter
from slora_flwr.models.backbone import Backbone


class LowRankAdapter(HeadAdapter):
    """Train factors of each target matrix: W = W_base + s·B·A with s = alpha / rank.

    The state holds `<module>.lora_A`, shape (rank, in), and `<module>.lora_B`, shape
    (out, rank). PEFT's start is A random, B zero; A then follows torch's global
    generator. LoRA: arXiv 2106.09685.

    Parameters
    ----------
    rank : int
        Inner dimension r.
    alpha : float
        PEFT's `lora_alpha`.
    """

    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha

    @property
    def scaling(self) -> float:
        """The factor s in W = W_base + s·B·A."""
        return self.alpha / self.rank

    def peft_config(self, backbone: Backbone) -> LoraConfig:
        """Describe this adapter to PEFT."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(backbone.targets),
        )

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        self._model = wrap(backbone.model, self.peft_config(backbone))
        trained = {}
        for name in backbone.targets:
            layer = backbone.model.get_submodule(name)
            trained[f"{name}.lora_A"] = layer.lora_A["default"].weight
            trained[f"{name}.lora_B"] = layer.lora_B["default"].weight
        return trained

    def _restore(self, backbone: Backbone) -> None:
        self._model.unload()
        del self._model


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put PEFT's LoRA layers into a model, without two warnings that do not apply."""
    with warnings.catch_warnings():
        # A model keeps a mark of adapters that `unload` has taken out again.
        warnings.filterwarnings("ignore", message=".*for a second time")
        # PEFT reads a property that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped
