"""What a policy refuses of a run: pure functions of the policy and of a run config."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from slora_flwr.common.code_digest import code_digest
from slora_flwr.config import RunConfig, Value, flatten
from slora_flwr.config.identity import code_identity
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.data_sets import columns_read
from slora_flwr.policy.policy import Policy

_RECIPE = "train."


class PolicyError(RuntimeError):
    """A run asks for more than the node's policy allows; the server is told why."""


def reason(key: str, given: str, allowed: object) -> str:
    """Return the words for what a key of the policy refuses."""
    return f"{key} of its policy: {given}; allowed: {allowed}"


def list_reasons(
    policy: Policy, config: RunConfig, own_columns: Sequence[str] = ()
) -> list[str]:
    """Return why a policy refuses a run; nothing if it does not.

    What only a node's messages, its data or its weights can show is not checked here: a
    model that `models` lacks by its name passes if there are digests.

    Parameters
    ----------
    policy : Policy
        The policy.
    config : RunConfig
        The run.
    own_columns : Sequence[str]
        The columns of the node's own data, for a run that trains on them.
    """
    checks = (_names, _columns, _fewest, _secure, _epsilon, _values)
    found = [told for check in checks for told in check(policy, config)]
    others = {*own_columns} - {*(policy.columns or own_columns)}
    if config.data.is_own and others:
        # They are the node's own affair.
        told = "this node's config names others"
        found.append(reason("columns", told, _listed(policy.columns)))
    return found


def code_of(config: RunConfig) -> list[str]:
    """Return the digests of the code that a run consists of here."""
    outside = code_identity(config).get("outside-code")
    return [code_digest(), *([str(outside)] if outside else [])]


def check_members(policy: Policy, members: int, what: str) -> None:
    """Raise PolicyError if a secure sum is one of too few nodes."""
    fewest = policy.fewest.members
    if fewest is not None and members < fewest:
        given = f"{members} nodes {what}"
        raise PolicyError(reason("fewest.members", given, f"at least {fewest}"))


def check_digest(policy: Policy, digest: str) -> None:
    """Raise PolicyError if a model's weights have none of the policy's digests."""
    if digest not in policy.digests:
        given = f"the weights' digest is {digest}"
        raise PolicyError(reason("models", given, _models(policy)))


def needs_digest(policy: Policy, config: RunConfig) -> bool:
    """Return whether it is for the weights' digest to show that a model is allowed."""
    return bool(policy.digests) and not policy.names_model(config.model.name)


def _names(policy: Policy, config: RunConfig) -> Iterator[str]:
    name = config.model.name
    unnamed = policy.models is not None and not policy.names_model(name)
    if unnamed and not policy.digests:
        yield reason("models", f"model.name is {name!r}", _models(policy))
    for key, given, known in (
        ("methods", config.method, policy.methods),
        ("tasks", config.task, policy.tasks),
    ):
        if known is not None and given not in known:
            yield reason(key, f"{key[:-1]} is {given!r}", _listed(known))
    if policy.code is not None:
        for digest in code_of(config):
            if digest not in policy.code:
                yield reason("code", f"its digest is {digest}", _listed(policy.code))


def _columns(policy: Policy, config: RunConfig) -> Iterator[str]:
    if policy.columns is None or config.data.is_own:
        return
    dialogues = config.task == "causal-lm"
    read = columns_read(config.data, config.clients.by, dialogues=dialogues).names
    if others := [name for name in read if name not in policy.columns]:
        given = f"the run reads {_listed(others)}"
        yield reason("columns", given, _listed(policy.columns))


def _fewest(policy: Policy, config: RunConfig) -> Iterator[str]:
    fewest, clients = policy.fewest, config.clients
    for name, key, given, least in (
        ("rounds", "rounds", config.rounds, fewest.rounds),
        ("clients", "clients.per-round", clients.per_round, fewest.clients),
        ("clients", "clients.min-replies", clients.min_replies, fewest.clients),
    ):
        if least is not None and given < least:
            yield reason(f"fewest.{name}", f"{key} is {given}", f"at least {least}")


def _secure(policy: Policy, config: RunConfig) -> Iterator[str]:
    for key, wanted in (
        ("secure-aggregation", policy.secure_aggregation),
        ("fewest.members", policy.fewest.members),
        ("peers", policy.peers),
    ):
        if wanted and not config.secure.aggregation:
            yield reason(key, "secure.aggregation is false", "true")


def _epsilon(policy: Policy, config: RunConfig) -> Iterator[str]:
    if policy.most.epsilon is not None and not config.privacy.of_examples:
        given = "the run has no privacy of single examples"
        allowed = "privacy.unit 'example', with privacy.epsilon or a noise multiplier"
        yield reason("most.epsilon", given, allowed)


def _values(policy: Policy, config: RunConfig) -> Iterator[str]:
    for key, bounds in policy.ranges.items():
        for value in _effective(config, key):
            if value not in bounds:
                yield reason(f"ranges.{key}", f"it is {value!r}", bounds)
    for key, values in policy.allowed.items():
        for value in _effective(config, key):
            # True is 1 to Python.
            if (type(value), value) not in [(type(v), v) for v in values]:
                known = _listed(repr(v) for v in values if not _is_path(v))
                yield reason(f"allowed.{key}", f"it is {value!r}", known)


def _effective(config: RunConfig, key: str) -> list[Value]:
    """Return the values that a key has in a run: of local training, each phase's.

    The learning rate is that of the head, too.
    """
    if not key.startswith(_RECIPE):
        return [flatten(config)[key]]
    name = key.removeprefix(_RECIPE).replace("-", "_")
    names = ("lr", "head_lr") if name == "lr" else (name,)
    recipes = [phase.recipe for phase in make_schedule(config)]
    return [*dict.fromkeys(getattr(recipe, n) for recipe in recipes for n in names)]


def _models(policy: Policy) -> str:
    return _listed(name for name in policy.models or [] if not _is_path(name))


def _is_path(value: object) -> bool:
    """Return whether a value may be a path, which is the node's own affair."""
    text = value if isinstance(value, str) else ""
    return text[:1] in ("/", "~", ".") or "\\" in text or text[1:2] == ":"


def _listed(names: Iterable[Any] | None) -> str:
    return ", ".join(map(str, names or ())) or "none"
