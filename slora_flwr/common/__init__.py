"""Tensors, random streams, SVDs, files and texts, which know nothing of a run."""
