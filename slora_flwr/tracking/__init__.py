"""What follows a run while it goes on: trackers, and metrics for Prometheus."""
