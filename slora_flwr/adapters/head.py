"""The adapter that trains only the head."""

from slora_flwr.adapters.base import Adapter


class HeadAdapter(Adapter):
    """Train only the head."""

    default_lr = 5e-3
