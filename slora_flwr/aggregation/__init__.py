"""Aggregators: how clients' updates combine, on a node and on the server."""
