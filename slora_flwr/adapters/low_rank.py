"""Low-rank adaptation through PEFT's LoRA layers."""

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

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
        with warnings.catch_warnings():
            # A model that was a PEFT model before keeps a mark of it, and PEFT warns of
            # a second adapter although `unload` took the first one out.
            warnings.filterwarnings("ignore", message=".*peft_config.*")
            model = get_peft_model(backbone.model, self.peft_config(backbone))
        assert isinstance(model, PeftModel)
        self._model = model
        trained = {}
        for name in backbone.targets:
            layer = backbone.model.get_submodule(name)
            trained[f"{name}.lora_A"] = layer.lora_A["default"].weight  # type: ignore[index,union-attr]
            trained[f"{name}.lora_B"] = layer.lora_B["default"].weight  # type: ignore[index,union-attr]
        return trained  # type: ignore[return-value]

    def _restore(self, backbone: Backbone) -> None:
        self._model.unload()
        del self._model
