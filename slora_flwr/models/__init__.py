"""Backbones: loading, residency, target matrices, head."""
