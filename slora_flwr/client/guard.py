"""What a node's policy does with a message: checks it, counts what it uses, logs it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from hashlib import sha256
from logging import ERROR
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.logger import log

from slora_flwr.backbone.load import digest_of
from slora_flwr.client.permits import masked
from slora_flwr.client.process import SharedContext, read_config
from slora_flwr.common.files import expand
from slora_flwr.common.text import printable
from slora_flwr.config import RunConfig, parse
from slora_flwr.data.node_files import TooFewError
from slora_flwr.policy.audit import append
from slora_flwr.policy.ledger import Ledger
from slora_flwr.policy.policy import Policy, read_identity, read_policy, state_folder
from slora_flwr.policy.rules import (
    PolicyError,
    check_digest,
    check_members,
    list_reasons,
    needs_digest,
    reason,
)
from slora_flwr.privacy.accountant import Release
from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.identity import Identity, Peers
from slora_flwr.tasks.choice import find_task
from slora_flwr.wire.messages import END, message_bytes

# The longest time, in seconds, that a node works on a message.
MOST_SECONDS = 86_400.0
_COLUMNS = ("data-text", "data-label", "data-response", "data-messages")
_WORK = ("train", "evaluate")


class Guard:
    """A node's policy in the handling of one message; without a policy, no limits.

    Parameters
    ----------
    message : Message
        The message.
    context : Context
        The node's context. Its node config, or else the environment variable
        SLORA_POLICY, names the policy. Nodes in the server's process have none.

    Raises
    ------
    PolicyFileError
        If the policy cannot be read, or what is kept beside it.

    Attributes
    ----------
    policy : Policy
        The policy.
    until : float
        When to stop, by the monotonic clock: the end of the message's time to live,
        counted from here, since other machines' clocks may differ; or before.
    identity : Identity or None
        The node's own key, which signs its keys of secure sums.
    peers : Peers or None
        The nodes that it shares secure sums with; None for any.
    """

    policy = Policy()
    identity: Identity | None = None
    peers: Peers | None = None

    def __init__(self, message: Message, context: Context) -> None:
        self._message, self._context = message, context
        self._kind = message.metadata.message_type
        # As written, since no comparison holds for NaN.
        ttl = message.metadata.ttl
        self._seconds = ttl if 0 < ttl <= MOST_SECONDS else MOST_SECONDS
        self.until = time.monotonic() + self._seconds
        # The key of the policy that ends the message before that, and what it allows.
        self._limit: tuple[str, str] | None = None
        self._folder: Path | None = None
        given = context.node_config.get("policy") or os.environ.get("SLORA_POLICY")
        if given and not isinstance(context, SharedContext):
            path = expand(str(given))
            self.policy = read_policy(path)
            self._folder = state_folder(path, self.policy)
            self._ledger = Ledger(self._folder, self.policy.most)
            self.identity = read_identity(path, self.policy)
            if self.policy.peers is not None:
                self.peers = Peers(self.policy.peers)

    @property
    def fewest(self) -> int:
        """The fewest examples that a client of this node trains on."""
        return self.policy.fewest.examples or 0

    def handle(self, handler: "Guarded") -> Message:
        """Return a handler's reply to the message, if the policy allows both.

        Raises
        ------
        PolicyError
            If it does not.
        """
        if self._folder is None:
            return handler(self._message, self._context, self)
        self._log("asked", **_facts(self._message, self._context))
        try:
            if self._kind == END:  # to delete is always allowed
                reply = handler(self._message, self._context, self)
            else:
                reply = self._work(handler)
        except (PolicyError, SecureError) as error:
            self._log("refused", reason=printable(error, 2000))
            raise
        except BaseException as error:
            # Its text may hold data.
            self._log("failed", error=type(error).__name__)
            raise
        if reply.has_error():
            self._log("failed", code=reply.error.code)
        else:
            sent = {"bytes": message_bytes(reply), "sha256": reply.content.object_id}
            self._log("answered", **sent)
        return reply

    def check_members(self, members: int, what: str) -> None:
        """Raise PolicyError if a secure sum is one of too few nodes."""
        check_members(self.policy, members, what)

    def spend(self, release: Release) -> None:
        """Count noised sums of single examples before they are made.

        Raises
        ------
        PolicyError
            If all runs together would spend too much.
        """
        if self._folder is not None:
            self._ledger.add_release(self._context.run_id, release)

    def _work(self, handler: "Guarded") -> Message:
        self._check(parse(self._context.run_config))
        with ExitStack() as stack:
            if self._kind in _WORK:
                self._reserve(stack)
            try:
                reply = handler(self._message, self._context, self)
            except TooFewError as error:
                if error.least != self.fewest:
                    raise  # by the node's config, which is its own affair
                log(ERROR, "%s", error)
                told = "a client here has fewer"
                least = f"at least {self.fewest}"
                raise PolicyError(reason("fewest.examples", told, least)) from None
            if self._limit and reply.has_error() and time.monotonic() >= self.until:
                key, allowed = self._limit
                raise PolicyError(
                    reason(key, "this message would take longer", allowed)
                )
        if not reply.has_error():
            self._ledger.add_bytes(self._context.run_id, message_bytes(reply))
        return reply

    def _check(self, config: RunConfig) -> None:
        """Raise PolicyError for a run that the policy does not allow."""
        named = (str(self._context.node_config.get(key, "")) for key in _COLUMNS)
        columns = [name.strip() for text in named for name in text.split(",")]
        if found := list_reasons(self.policy, config, [*filter(None, columns)]):
            raise PolicyError("; ".join(found))
        self._ledger.check()
        if needs_digest(self.policy, config):
            read_config(self._context)  # which checks the model's path
            with masked():
                digest = _digest(config)
            check_digest(self.policy, digest)

    def _reserve(self, stack: ExitStack) -> None:
        """Set `until`, and count the seconds that work may take until then."""
        started, run = time.monotonic(), self._context.run_id
        most = self.policy.most.message_seconds
        if most is not None and most < self._seconds:
            self._seconds = most
            self._limit = "most.message-seconds", f"{most:g}"
        name, granted = self._ledger.reserve(run, self._seconds)
        if granted < self._seconds:
            self._seconds = granted
            self._limit = "most.seconds", f"{self.policy.most.seconds:g} in all"
        self.until = started + self._seconds
        stack.callback(
            lambda: self._ledger.settle(run, name, time.monotonic() - started)
        )

    def _log(self, event: str, **facts: Any) -> None:
        if self._folder is not None:
            told = {"event": event, "run": str(self._context.run_id)}
            append(self._folder, told | {"kind": self._kind} | facts)


Guarded = Callable[[Message, Context, Guard], Message]


def _facts(message: Message, context: Context) -> dict[str, Any]:
    """Return what was asked: of which round, by whom, and in what run."""
    config = json.dumps(dict(context.run_config), sort_keys=True)
    facts: dict[str, Any] = {
        "from": str(message.metadata.src_node_id),
        "config": sha256(config.encode()).hexdigest(),
    }
    records = message.content.config_records if message.has_content() else {}
    asked: Mapping[str, Any] = records.get("config", {})
    for key in ("server-round", "phase", "attempt"):
        if type(given := asked.get(key)) is int:
            facts[key] = given
    return facts


@lru_cache(maxsize=1)
def _digest(config: RunConfig) -> str:
    return digest_of(config.model, find_task(config))
