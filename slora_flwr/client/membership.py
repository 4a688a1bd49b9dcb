"""What a node keeps for secure aggregation: new keys, and its part in a round.

Both are in Flower's `Context`, which never leaves the node.
"""

from typing import cast

from flwr.app import ConfigRecord, Context

from slora_flwr.aggregation.ring_sum import RingSum
from slora_flwr.client.errors import MismatchError
from slora_flwr.config import RunConfig, parse
from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.identity import Identity, Peers, ShownKeys
from slora_flwr.secure.keys import PrivateKeys
from slora_flwr.secure.member import Member
from slora_flwr.secure.terms import Terms
from slora_flwr.wire.messages import Instruction, Report
from slora_flwr.wire.secure_messages import (
    Introduction,
    Letters,
    MaskedReport,
    Question,
)

_KEYS, _MEMBER = "secure-keys", "secure-member"
# Keys that wait for a round: those told last, and some whose telling was perhaps lost.
_MOST_KEYS = 4


def new_keys(context: Context, identity: Identity | None = None) -> bytes:
    """Make keys for a round to come, and return the public ones.

    Parameters
    ----------
    context : Context
        The node's context.
    identity : Identity or None
        Signs them; None for no signature.
    """
    keys = PrivateKeys.generate()
    public = keys.public.pack()
    waiting = dict(context.state.config_records.get(_KEYS, {}))
    waiting[public.hex()] = keys.seal + keys.mask
    newest = list(waiting.items())[-_MOST_KEYS:]
    context.state[_KEYS] = ConfigRecord(dict(newest))
    if identity is None:
        return public
    return identity.show(keys.public, context.run_id).pack()


def check_secure(config: RunConfig) -> None:
    """Raise MismatchError if a run has no secure aggregation."""
    if not config.secure.aggregation:
        raise MismatchError("this run's config has secure.aggregation off")


def join_round(
    context: Context,
    told: Introduction,
    identity: Identity | None = None,
    peers: Peers | None = None,
) -> Letters:
    """Take part in an attempt at a round, in place of any before.

    Parameters
    ----------
    context : Context
        The node's context.
    told : Introduction
        Its neighbours.
    identity : Identity or None
        The node's own.
    peers : Peers or None
        Who may be a neighbour; None for all.

    Raises
    ------
    SecureError
        If the keys are not this node's, or were used before; if a neighbour is no peer;
        or if the neighbours are such that the sum would be no secret.
    """
    waiting = dict(context.state.config_records.get(_KEYS, {}))
    private = cast(bytes, waiting.pop(told.own.hex(), b""))
    if not private:
        raise SecureError("the keys named for this node are not its own, or were used")
    context.state[_KEYS] = ConfigRecord(waiting)
    shown = {n: ShownKeys.unpack(keys) for n, keys in told.neighbours.items()}
    if peers is not None:
        own = [] if identity is None else [identity.name]
        peers.check(shown, context.run_id, own)
    config = parse(context.run_config)
    half = len(private) // 2
    member = Member(
        Terms(told.run, told.server_round, told.attempt, config.secure.threshold),
        told.number,
        PrivateKeys(private[:half], private[half:]),
        {number: keys.public for number, keys in shown.items()},
    )
    letters = member.letters()
    _keep(context, member)
    return Letters(letters, member.commitment, new_keys(context, identity))


def receive_letters(context: Context, instruction: Instruction) -> Member:
    """Return this node's part in an instruction's round, with its neighbours' shares.

    Raises
    ------
    SecureError
        If the node takes no part in that round, has trained in it, or a letter is off.
    """
    member = _member(context)
    if member.has_masked or member.terms.server_round != instruction.server_round:
        raise SecureError(
            f"this node's part is in round {member.terms.server_round}, not masked yet "
            f"is {not member.has_masked}; asked to train in {instruction.server_round}"
        )
    member.receive(instruction.letters)
    return member


def mask_sum(context: Context, member: Member, fold: RingSum, about: bytes) -> bytes:
    """Return the masked sum of this node's clients, with noise, and its figures.

    `about` is what `Trainer.digest_task` says.
    """
    fold.perturb()
    member.mask(fold.values, fold.figures, about=about)
    # Before it is sent, so that nothing is masked twice with the same keys.
    _keep(context, member)
    return fold.ring.pack(fold.values) + fold.figures.tobytes()


def masked_report(report: Report, masked: bytes) -> MaskedReport:
    """Return what is told of a report with secure aggregation."""
    return MaskedReport(
        report.server_round,
        report.phase,
        report.fingerprint,
        masked,
        report.clients,
        report.failures,
        report.wire,
    )


def tell_shares(context: Context, asked: Question) -> dict[int, bytes]:
    """Return the shares that open a round's sum, once, and forget the node's part.

    Raises
    ------
    SecureError
        If the question is of another attempt; and see `Member.tell`.
    """
    member = _member(context)
    part = member.terms.server_round, member.terms.attempt
    if part != (asked.server_round, asked.attempt):
        raise SecureError(f"asked of round {asked.server_round}, its part is in {part}")
    shares = member.tell(asked.alive, asked.dead)
    del context.state[_MEMBER]
    return shares


def _member(context: Context) -> Member:
    kept = context.state.config_records.get(_MEMBER)
    if kept is None:
        raise SecureError("this node takes part in no round")
    return Member.unpack(cast(bytes, kept["member"]))


def _keep(context: Context, member: Member) -> None:
    context.state[_MEMBER] = ConfigRecord({"member": member.pack()})
