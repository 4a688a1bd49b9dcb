"""Conformance vectors for aggregators of federated LoRA, and their runner."""
