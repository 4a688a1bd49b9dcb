"""The Flower ServerApp."""

from slora_flwr.engines.server_app import app

__all__ = ["app"]
