"""Bytes and memory of a run, from its config alone."""
