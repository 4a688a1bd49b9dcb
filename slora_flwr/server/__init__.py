"""The server: strategy, rounds, aggregation, run directory, the in-process grid."""
