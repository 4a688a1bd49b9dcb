"""Vectors in weight space for aggregators of federated LoRA, and their runner."""
