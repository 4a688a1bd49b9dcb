"""The error of a run config that cannot be run."""


class ConfigError(ValueError):
    """A run config that cannot be run; the message names the key."""


def refuse(key: str, given: object, allowed: str) -> ConfigError:
    """Return the error that names a key, what was given and what is allowed."""
    return ConfigError(f"{key} is {given!r}; allowed: {allowed}")
