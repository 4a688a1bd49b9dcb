"""Federated fine-tuning of transformers on Flower: SLoRA and its peers."""

__version__ = "0.1.0"
