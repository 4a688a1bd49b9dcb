"""BitFit: the bias terms alone (arXiv 2106.10199)."""

from slora_flwr.adapters.full import FullAdapter


class BiasAdapter(FullAdapter):
    """Train every bias of the backbone, those of its normalisations included."""

    def _trains(self, name: str) -> bool:
        return name.endswith(".bias")
