"""The head alone."""

from slora_flwr.adapters.base import Adapter


class HeadAdapter(Adapter):
    """Train the head and nothing else."""

    default_lr = 5e-3
