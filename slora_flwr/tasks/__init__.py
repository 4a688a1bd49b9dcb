"""Tasks: what an example, a loss and a metric are."""
