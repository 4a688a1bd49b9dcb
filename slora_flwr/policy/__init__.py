"""A node's policy: what its operator allows all runs, what they used, and a log."""
