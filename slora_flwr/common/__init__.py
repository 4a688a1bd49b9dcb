"""Helpers that know nothing of runs: tensors, random streams, SVDs, files, text."""
