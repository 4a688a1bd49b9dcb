"""The error of a run config that cannot be run."""

from slora_flwr.common.text import printable


class ConfigError(ValueError):
    """A run config that cannot be run; the message names the key."""


def refuse(key: str, given: object, allowed: str) -> ConfigError:
    """Return the error that names a key, what was given and what is allowed."""
    return ConfigError(f"{key} is {printable(repr(given))}; allowed: {allowed}")
