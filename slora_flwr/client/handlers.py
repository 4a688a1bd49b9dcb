"""What a node does with a message: describe, train or evaluate its clients."""

import time
from collections.abc import Callable
from functools import partial, wraps
from logging import ERROR

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.logger import log

from slora_flwr.aggregation.choice import make_aggregator
from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.ring_sum import RingSum
from slora_flwr.client.description import describe, node_name
from slora_flwr.client.errors import MissingBaseError, MissingStateError
from slora_flwr.client.guard import Guard, Guarded
from slora_flwr.client.keeping import kept_in, limit, remember, remove
from slora_flwr.client.membership import (
    check_secure,
    join_round,
    mask_sum,
    masked_report,
    receive_letters,
    tell_shares,
)
from slora_flwr.client.network_bytes import count_wire
from slora_flwr.client.participation import take_part
from slora_flwr.client.process import (
    get_process,
    is_simulated,
    make_process,
    one_by_one,
    read_config,
)
from slora_flwr.client.sender import Sender
from slora_flwr.client.spending import spend
from slora_flwr.common.memory import return_freed
from slora_flwr.common.text import printable
from slora_flwr.data.node_files import OwnDataError
from slora_flwr.policy.policy import Policy, PolicyFileError
from slora_flwr.policy.rules import PolicyError
from slora_flwr.privacy.examples import BudgetError
from slora_flwr.secure.errors import SecureError
from slora_flwr.tasks.base import pool
from slora_flwr.training.trainer import ClientError
from slora_flwr.wire.messages import (
    END,
    MISSING_BASE,
    MISSING_STATE,
    Instruction,
    Report,
    read_lineage,
    release,
    write_evaluation,
)
from slora_flwr.wire.secure_messages import (
    INTRODUCE,
    TELL,
    Introduction,
    Question,
    write_shares,
)

Handler = Callable[[Message, Context], Message]

# In place of a reason that may tell of the data.
FAILED = "it failed; its node's log says why"


def _with_known_errors(handler: Guarded) -> Handler:
    """Have the node's policy guard a handler, and bound what the node keeps.

    Errors on which the server can act are replies.
    """

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        policy = Policy()
        try:
            guard = Guard(message, context)
            policy = guard.policy
            return guard.handle(handler)
        except MissingBaseError as error:
            return Message(Error(MISSING_BASE, str(error)), reply_to=message)
        except MissingStateError as error:
            return Message(Error(MISSING_STATE, str(error)), reply_to=message)
        except (SecureError, PolicyError) as error:
            log(ERROR, "refused: %s", error)
            return Message(Error(0, f"it refuses: {error}"), reply_to=message)
        except PolicyFileError as error:
            # Where its files are, and what is in them, is the node's own affair.
            log(ERROR, "refused: %s", printable(error, 2000))
            reason = "it refuses: its policy or log is of no use; its own log says why"
            return Message(Error(0, reason), reply_to=message)
        except OwnDataError as error:
            # Details stay in this log: the server needs neither paths nor columns.
            log(ERROR, "%s", printable(error, 2000))
            name = node_name(context)
            reason = f"{name}: its data is of no use; its own log says why"
            return Message(Error(0, reason), reply_to=message)
        finally:
            if not is_simulated(context):
                limit(context, policy.most.gigabytes)

    return answer


@_with_known_errors
def query(message: Message, context: Context, guard: Guard) -> Message:
    """Describe this node: its code, its backbone, its clients and their sizes."""
    if message.content.config_records:  # which another version's query lacks
        remember(context, read_lineage(message.content))
    return Message(describe(context, guard.fewest, guard.identity), reply_to=message)


@_with_known_errors
def end(message: Message, context: Context, guard: Guard) -> Message:
    """Remove what this node keeps for a run that has ended."""
    remove(context, read_lineage(message.content))
    if not is_simulated(context):  # Otherwise the process ends with the simulation.
        make_process.cache_clear()
    return Message(RecordDict(), reply_to=message)


@_with_known_errors
def train(message: Message, context: Context, guard: Guard) -> Message:
    """Train clients one after another and fold their updates.

    Nobody waits for a reply after the message's time to live, so no batch is begun
    then.
    """
    instruction = Instruction.read(message.content)
    guard.check_members(len(instruction.letters) + 1, "train")
    release(message)
    process = get_process(context, instruction, guard.fewest)
    state = process.prepare(instruction, kept_in(context))

    trainer = process.trainer
    phase = trainer.schedule[instruction.phase].at(instruction.phase_round)
    is_private = trainer.config.privacy.of_examples
    masks = None
    if trainer.config.secure.aggregation:
        masks = receive_letters(context, instruction)
        shapes = trainer.model.adapter.returned()
        section = phase.adapter_type.section
        fold: Mean = RingSum(trainer.config, section, shapes)
    else:
        head = trainer.model.backbone.head_size
        fold = make_aggregator(phase, trainer.config, head).make_fold()
    sender = Sender(trainer, context, instruction)
    report = Report(
        instruction.server_round,
        instruction.phase,
        instruction.fingerprint,
        wire=count_wire(str(context.node_config.get("wire-interface", ""))),
    )
    for client in one_by_one(instruction.clients, context):
        started = time.perf_counter()
        try:
            number = instruction.server_round
            train_client = partial(
                trainer.train_client, client, state, phase, number, guard.until
            )
            if is_private:
                index = instruction.phase
                noise = spend(context, trainer, client, index, guard.spend)
                train_client = partial(train_client, noise_multiplier=noise)
            take_part(context, trainer.config, client, number)
            turn = train_client()
            upload = sender.code(client, turn.update, state)
            fold.add_upload(upload, turn.weight, client, turn.loss)
        except (PolicyError, SecureError):
            raise
        except BudgetError as error:
            report.failures[client] = str(error)
            continue
        except Exception as error:
            is_secret = is_private or masks is not None
            if not (is_secret or isinstance(error, ClientError | FoldError)):
                raise
            report.failures[client] = str(error)
            if is_secret:  # the reason may hold a loss, or words of a text
                log(ERROR, "client %d failed: %s", client, printable(error))
                report.failures[client] = FAILED
            continue
        sender.keep(client, upload)
        report.update = upload.array
        # How many examples the steps drew is no public figure.
        seconds = 0.0 if is_private else time.perf_counter() - started
        size = len(upload.array.data)
        report.add(client, turn.weight, turn.loss, seconds, size)

    return_freed()  # what training kept for its next step
    if not report.clients:
        reasons = "; ".join(f"client {c}: {r}" for c, r in report.failures.items())
        return Message(Error(0, reasons), reply_to=message)
    if masks is not None:
        told = instruction.phase, instruction.fingerprint, instruction.base
        about = trainer.digest_task(*told, state)
        masked = mask_sum(context, masks, RingSum.of(fold), about)
        return Message(masked_report(report, masked).content(), reply_to=message)
    if len(report.clients) > 1:  # a single update is smaller encoded
        report.update = fold.packed()
    return Message(report.content(), reply_to=message)


@_with_known_errors
def introduce(message: Message, context: Context, guard: Guard) -> Message:
    """Share the secrets of this node's part in a round with its neighbours."""
    check_secure(read_config(context))
    told = Introduction.read(message.content)
    guard.check_members(len(told.neighbours) + 1, "are introduced")
    letters = join_round(context, told, guard.identity, guard.peers)
    return Message(letters.content(), reply_to=message)


@_with_known_errors
def tell(message: Message, context: Context, guard: Guard) -> Message:
    """Tell this node's shares of the secrets without which a sum cannot be read."""
    check_secure(read_config(context))
    asked = Question.read(message.content)
    guard.check_members(len({*asked.alive}), "are in the sum")
    shares = tell_shares(context, asked)
    return Message(write_shares(shares), reply_to=message)


@_with_known_errors
def evaluate(message: Message, context: Context, guard: Guard) -> Message:
    """Evaluate a state on the held-out examples of some clients.

    No batch is begun after the message's time to live.
    """
    instruction = Instruction.read(message.content)
    release(message)
    process = get_process(context, instruction, guard.fewest)
    state = process.prepare(instruction, kept_in(context))
    evaluate_client = process.trainer.evaluate_client
    try:
        clients = one_by_one(instruction.clients, context)
        results = [evaluate_client(c, state, guard.until) for c in clients]
    except ClientError as error:
        return Message(Error(0, str(error)), reply_to=message)
    found = [result for result in results if result is not None]
    content = write_evaluation(pool(found) if found else None)
    return Message(content, reply_to=message)


HANDLERS: dict[str, Handler] = {
    "query": query,
    "train": train,
    INTRODUCE: introduce,
    TELL: tell,
    "evaluate": evaluate,
    END: end,
}
