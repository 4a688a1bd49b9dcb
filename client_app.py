"""The Flower ClientApp."""

from slora_flwr.engines.client_app import app

__all__ = ["app"]
