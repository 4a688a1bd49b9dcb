"""The keys of a node's policy: what its operator allows, which no run can override.

A policy is a TOML file beside the node's key. A key that it lacks is no limit. The
tables `[ranges]` and `[allowed]` have keys of the run config.
"""

import math
import posixpath
import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from slora_flwr.common.files import expand, read_regular
from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError, Value, list_keys, refuse
from slora_flwr.config.allowed import POSITIVE, Allowed, allow, at_least
from slora_flwr.config.sections import STRICT, TASKS
from slora_flwr.secure.identity import Identity, Peers

_DIGEST = re.compile("[0-9a-f]{32}")

_Names = Annotated[list[str] | None, allow("a list of at least one name", bool)]
_Count = Annotated[int | None, allow("a whole number of at least 1", lambda n: n > 0)]


class PolicyFileError(ConfigError):
    """A policy that cannot be read, or what is kept beside it: all runs are refused."""


@dataclass(frozen=True, config=STRICT)
class Fewest:
    """The fewest of something that a run must have."""

    rounds: _Count = Field(default=None, description="The rounds of a run.")
    examples: _Count = Field(
        default=None,
        description="The examples that a client of this node trains on. With data of "
        "its own the larger of this and the node config's `min-examples` holds.",
    )
    clients: _Count = Field(
        default=None,
        description="The clients of a round: `clients.per-round` and "
        "`clients.min-replies`.",
    )
    members: _Count = Field(
        default=None,
        description="The nodes that this one shares a secure sum with, itself among "
        "them: those it is introduced to, those that train, and those in the sum. Runs "
        "without secure sums are refused.",
    )


@dataclass(frozen=True, config=STRICT)
class Most:
    """The most that all runs together may use, and that a message or the disk may."""

    bytes: Annotated[
        int | None, allow("a whole number of at least 0", lambda n: n >= 0)
    ] = Field(default=None, description="The bytes that all runs together are sent.")
    seconds: Annotated[float | None, POSITIVE] = Field(
        default=None,
        description="The seconds of training and evaluation of all runs together.",
    )
    epsilon: Annotated[float | None, POSITIVE] = Field(
        default=None,
        description="The epsilon of single examples that all runs together spend. Runs "
        "without privacy of single examples are refused.",
    )
    delta: Annotated[float, allow("a number above 0 below 1", lambda x: 0 < x < 1)] = (
        Field(default=1e-5, description="The delta at which `most.epsilon` holds.")
    )
    message_seconds: Annotated[float | None, POSITIVE] = Field(
        default=None,
        description="The seconds after which no batch of a message is begun.",
    )
    gigabytes: Annotated[float | None, at_least(0)] = Field(
        default=None,
        description="The size of the node's cache, as `cache-gigabytes` of the node "
        "config, of which the smaller holds.",
    )


_BOUND = allow("a finite number", math.isfinite)


@dataclass(frozen=True, config=STRICT)
class Range:
    """The numbers that a key of the run config may have, both ends included."""

    least: Annotated[float, _BOUND] = Field(default=-math.inf)
    most: Annotated[float, _BOUND] = Field(default=math.inf)

    def __contains__(self, value: Value) -> bool:
        return self.least <= float(value) <= self.most

    def __str__(self) -> str:
        if math.inf == self.most:
            return f"at least {self.least:g}"
        low = "up to" if self.least == -math.inf else f"{self.least:g} to"
        return f"{low} {self.most:g}"


@dataclass(frozen=True, config=STRICT)
class Policy:
    """What a node's operator allows."""

    models: _Names = Field(
        default=None,
        description="The models, each by a name, a pattern of names such as "
        "`sentence-transformers/*`, or the 32 hex digits of its weights' digest.",
    )
    columns: _Names = Field(
        default=None, description="The columns of data that may be read."
    )
    methods: _Names = Field(default=None, description="The methods.")
    tasks: Annotated[
        list[str] | None, allow(f"a list of {', '.join(TASKS)}", {*TASKS}.issuperset)
    ] = Field(default=None, description="The tasks.")
    code: Annotated[
        list[str] | None,
        allow(
            "a list of digests of 32 hex digits",
            lambda names: bool(names) and all(map(_DIGEST.fullmatch, names)),
        ),
    ] = Field(
        default=None,
        description="The digests of code that was approved: slora-flwr's, which "
        "`slora node check` prints, and those of packages of other methods.",
    )
    secure_aggregation: Annotated[bool, allow("true or false", lambda _: True)] = Field(
        default=False, description="Whether runs without secure sums are refused."
    )
    key: Annotated[str | None, allow("a file", bool)] = Field(
        default=None,
        description="The node's private key, such as the one that it is registered "
        "with: ECDSA or Ed25519 in OpenSSH's format. It signs the node's keys of "
        "secure sums, for others' `peers`. A path, absolute or relative to the policy.",
    )
    peers: Annotated[list[str] | None, allow("a list of public keys", bool)] = Field(
        default=None,
        description="The public keys, in OpenSSH's format, of the nodes that it shares "
        "secure sums with. Runs without secure sums are refused.",
    )
    state: Annotated[str, allow("a folder", bool)] = Field(
        default="state",
        description="The folder of the log and of what runs have used, absolute or "
        "relative to the policy.",
    )
    fewest: Fewest = Fewest()
    most: Most = Most()
    ranges: dict[str, Range] = Field(default_factory=dict)
    allowed: dict[str, list[Any]] = Field(default_factory=dict)

    @property
    def digests(self) -> list[str]:
        """The digests in `models`."""
        return [name for name in self.models or [] if _DIGEST.fullmatch(name)]

    def names_model(self, name: str) -> bool:
        """Return whether `models` has a model by its name."""
        # A folder `..` would lead out of what a pattern means.
        plain = posixpath.normpath(name)
        names = {*(self.models or [])} - {*self.digests}
        return any(fnmatchcase(plain, known) for known in names)


_NONE = Policy()
_TABLES: dict[str, type] = {"fewest": Fewest, "most": Most}


def read_policy(path: str | Path) -> Policy:
    """Return the policy in a file.

    Raises
    ------
    PolicyFileError
        If it cannot be read, or a key or value is not allowed.
    """
    try:
        table = tomllib.loads(read_regular(expand(path)).decode())
    except (OSError, ValueError) as error:
        raise PolicyFileError(f"policy {path} cannot be read ({error})") from error
    try:
        return parse_policy(table)
    except ConfigError as error:
        raise PolicyFileError(f"policy {path}: {error}") from error


def state_folder(path: Path, policy: Policy) -> Path:
    """Return the folder of what is kept for the policy in a file."""
    return path.absolute().parent / expand(policy.state)


def read_identity(path: Path, policy: Policy) -> Identity | None:
    """Return the node's own key, for the policy in a file; None without one.

    Raises
    ------
    PolicyFileError
        If it cannot be read, or is of no use.
    """
    if policy.key is None:
        return None
    file = path.absolute().parent / expand(policy.key)
    try:
        return Identity(read_regular(file))
    except (OSError, ValueError) as error:
        told = f"policy {path}: key is {printable(policy.key)}; allowed: a private key "
        raise PolicyFileError(f"{told}without a passphrase ({error})") from error


def parse_policy(table: Mapping[str, Any]) -> Policy:
    """Return the policy in a TOML document.

    Raises
    ------
    ConfigError
        Names the key, what was given and what is allowed.
    """
    given = dict(table)
    for name in (*_TABLES, "ranges", "allowed"):
        if not isinstance(given.get(name, {}), dict):
            raise refuse(name, given[name], "a table")
        given[name] = dict(given.get(name, {}))
    for name, kind in _TABLES.items():
        given[name] = _make(name, kind, given[name])
    kinds = {key.name: key.type for key in list_keys()}
    for name in ("ranges", "allowed"):
        for key in given[name]:
            if key not in kinds:
                raise ConfigError(f"{name}.{printable(key)} is not a run config key")
    for key, bounds in given["ranges"].items():
        name = f"ranges.{key}"
        if kinds[key] not in ("integer", "float"):
            raise refuse(name, bounds, f"nothing, since {key} is a {kinds[key]}")
        if not isinstance(bounds, dict) or not bounds:
            raise refuse(name, bounds, "a table of least, most or both")
        given["ranges"][key] = _make(name, Range, bounds)
    for key, values in given["allowed"].items():
        if not isinstance(values, list) or not values:
            raise refuse(f"allowed.{key}", values, "a list of at least one value")
    made: Policy = _make("", Policy, given)
    try:
        Peers(made.peers or [])
    except ValueError as error:
        raise ConfigError(f"peers: {error}; allowed: OpenSSH public keys") from error
    return made


class PolicyKey(NamedTuple):
    """One key of the policy; see `slora_flwr.config.Key`."""

    name: str
    allowed: str
    help: str


def list_policy_keys() -> Iterator[PolicyKey]:
    """Yield all keys but those of `ranges` and `allowed`."""
    for section, kind in {"": Policy, **_TABLES}.items():
        for name, field in _fields(kind).items():
            if field.description:
                yield PolicyKey(_key(section, name), _words(field), field.description)


def stated(policy: Policy) -> dict[str, Any]:
    """Return the limits of a policy by their keys; those that it lacks are left out."""
    found: dict[str, Any] = {}
    for section, kind in {"": Policy, **_TABLES}.items():
        owner, none = ((getattr(p, section) if section else p) for p in (policy, _NONE))
        for name, field in _fields(kind).items():
            value = getattr(owner, name)
            if field.description and value != getattr(none, name):
                found[_key(section, name)] = value
    found |= {f"ranges.{key}": bounds for key, bounds in policy.ranges.items()}
    return found | {f"allowed.{key}": values for key, values in policy.allowed.items()}


def _make(section: str, kind: Any, given: Mapping[str, Any]) -> Any:
    """Return a table of a policy from unchecked values."""
    names = {_key("", name): name for name in _fields(kind)}
    for key in given:
        if key not in names:
            known = ", ".join(names)
            whole = printable(_key(section, key))
            raise ConfigError(f"{whole} is not a policy key; known: {known}")
    try:
        return kind(**{names[key]: value for key, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        value = given[_key("", name)]
        words = _words(_fields(kind)[name])
        raise refuse(_key(section, name), value, words) from None


def _fields(kind: Any) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return fields


def _key(section: str, name: str) -> str:
    return f"{section}.{name.replace('_', '-')}".lstrip(".")


def _words(field: FieldInfo) -> str:
    words = [known.words() for known in field.metadata if isinstance(known, Allowed)]
    return words[-1] if words else ""
