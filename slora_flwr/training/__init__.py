"""Local training, evaluation, and the process that does both."""
