"""Folds of clients' updates, on a node and on the server."""
