"""The error of a run config that cannot be run."""


class ConfigError(ValueError):
    """A run config that cannot be run, named by its key."""
