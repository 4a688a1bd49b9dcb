"""A local page that follows a run."""
