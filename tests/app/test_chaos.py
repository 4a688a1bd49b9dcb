"""A run through hundreds of random faults, against what the rules say comes of them."""

import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, Error, Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from slora_flwr.client.process import make_process
from slora_flwr.common.files import cache_folder
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.server import collect, fleet
from slora_flwr.server.round import NO_REPLY
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training.trainer import ClientError, ClientUpdate, Trainer
from slora_flwr.wire.messages import MISSING_BASE, MISSING_STATE, Instruction, Report
from tests.support.clock import Clock
from tests.support.grids import Grid
from tests.support.resuming import InterruptionError, files, resumed, without
from tests.support.runs import (
    INT8,
    LOSSLESS,
    TOP,
    Config,
    differ,
    elsewhere,
    events,
    final,
    ledger,
    make_config,
    start,
)

NODES, CLIENTS = 8, 24
GONE = int(ErrorCode.NODE_UNAVAILABLE)

# Of these nothing comes: the node's clients count.
HARMLESS = (
    "it answers slowly",
    "it answers twice",
    "an answer of a round before comes again",
    "its process ends between two rounds",
    "it loses its process and its cache",
    "it leaves and comes back between two rounds",
)
# With these a node's clients are left out of the round, for a reason that is like this;
# with `ONE_CLIENT` one is.
ONE_CLIENT = "one of its clients fails"
HARMFUL = {
    "it raises": "error 0: OSError: no space left",
    ONE_CLIENT: "no examples left",
    "it hangs and answers a later round": NO_REPLY,
    "it is killed before it has trained": f"error {GONE}: ",
    "it is killed when it has trained": f"error {GONE}: ",
    "its message is lost": NO_REPLY,
    "it answers what it answered before": "its round is ",
    "it answers the other phase": "its phase is ",
    "it answers half the bytes": "bytes|cannot be expanded",
    "it has another mask": "its fingerprint is f00d, not ",
}
DEATH = "the server is interrupted"


@dataclass
class Chaos:
    """What happens, drawn by a seed, however often the run is interrupted."""

    kinds: tuple[str, ...]
    draw: random.Random
    done: Counter[str] = field(default_factory=Counter)
    # Of the last attempt at a round.
    lost: dict[int, set[int]] = field(default_factory=dict)
    # Node, clients and fault, of all attempts at a round since the last interruption.
    told: dict[int, list[tuple[int, list[int], str]]] = field(default_factory=dict)


class ChaosGrid(Grid):
    """Nodes, and a network, of which two in three have a fault in a round."""

    def __init__(self, config: Config, chaos: Chaos) -> None:
        super().__init__(config, NODES)
        self._chaos = chaos
        self._faults: dict[int, str] = {}
        # What becomes of clients' training.
        self.fails: dict[int, str] = {}
        self._round = 0
        self._left = 0
        self._since = dict.fromkeys(self._contexts, 0)
        # Rounds in which nodes that hang or are dead are back.
        self._silent = dict.fromkeys(self._contexts, 0)
        self._absent = dict.fromkeys(self._contexts, 0)
        self._polls: Counter[str] = Counter()
        # Nodes that lost something: in this round, and those not yet sent it again.
        self._lost: set[int] = set()
        self._missing: set[int] = set()
        self._late: list[Message] = []
        self._before: dict[int, dict[int, Report]] = defaultdict(dict)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=n, last_activated_at=str(since))
            for n, since in self._since.items()
            if self._absent[n] <= self._round + 1
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if not sent or sent[0].metadata.message_type != MessageType.TRAIN:
            return super().push_messages(sent)
        at = sent[0].metadata.dst_node_id
        if at in self._missing:  # the round's message, with what the node lacks
            self._missing.remove(at)
        else:
            self._begin(sent)
        return super().push_messages(
            m for m in sent if self._fault(m) != "its message is lost"
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for number in [*message_ids]:
            message = self._sent[number]
            at, fault = message.metadata.dst_node_id, self._fault(message)
            self._polls[number] += 1
            if message.metadata.message_type != MessageType.TRAIN:
                if self._silent[at] <= self._round + 1:
                    yield self._answer(self._sent.pop(number))
            elif fault == "it answers slowly" and self._polls[number] < 4:
                continue
            elif fault == "it hangs and answers a later round":
                if self._polls[number] == 1:
                    self._late.append(self._answer(message))
                    self._missing.discard(at)
            elif fault == "it is killed before it has trained":
                yield self._gone(self._sent.pop(number))
            elif fault == "it is killed when it has trained":
                self._answer(message)
                self._missing.discard(at)
                yield self._gone(self._sent.pop(number))
            else:
                if fault == "an answer of a round before comes again":
                    yield from self._earlier()
                reply = self._answer(self._sent.pop(number))
                yield reply
                if fault == "it answers twice":
                    yield reply

    def _fault(self, message: Message) -> str:
        return self._faults.get(message.metadata.dst_node_id, "")

    def _gone(self, message: Message) -> Message:
        """Answer as the SuperLink does."""
        return Message(Error(GONE, "Node is unavailable."), reply_to=message)

    def _begin(self, sent: list[Message]) -> None:
        """Draw what happens in an attempt at a round."""
        chaos, draw = self._chaos, self._chaos.draw
        if self._round == 0:  # of this grid
            first = int(sent[0].metadata.group_id)
            chaos.told = {n: told for n, told in chaos.told.items() if n < first}
        self._round = int(sent[0].metadata.group_id)
        told = chaos.told.setdefault(self._round, [])
        lost = chaos.lost[self._round] = set()
        self._faults, self.fails, self._lost = {}, {}, set()
        # How many answers the server lives to see.
        self._left = draw.randrange(70)
        for message in sent:
            if draw.random() < 0.35:
                continue
            at, fault = message.metadata.dst_node_id, draw.choice(chaos.kinds)
            asked = Instruction.read(message.content).clients
            if fault == "it answers what it answered before" and not self._replies(at):
                fault = "it raises"
            if (
                fault == "an answer of a round before comes again"
                and not self._earlier()
            ):
                fault = "it answers twice"
            self._faults[at] = fault
            self._happen(at, fault)
            if fault in HARMFUL:
                failing = [draw.choice(asked)] if fault == ONE_CLIENT else asked
                told.append((at, failing, fault))
                self.fails |= dict.fromkeys(failing, fault)
                lost |= {*failing}
            chaos.done[fault] += 1

    def _happen(self, at: int, fault: str) -> None:
        """Let a fault outlive the message in which it shows."""
        back = self._round + self._chaos.draw.randint(1, 3)
        if fault.startswith("it hangs"):
            self._silent[at] = back
        elif fault.startswith("it is killed"):
            self._absent[at] = back
            self._since[at] += 1
        elif fault.startswith("it leaves"):
            self._since[at] += 1

    def _earlier(self) -> list[Message]:
        """Give late answers, of the rounds before."""
        now = str(self._round)
        return [reply for reply in self._late if reply.metadata.group_id != now]

    def _replies(self, at: int) -> list[int]:
        """List the rounds before that a node has answered."""
        return sorted(n for n in self._before[at] if n < self._round)

    def _answer(self, message: Message) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return super()._answer(message)
        self._left -= 1
        if self._left == 0:
            self._chaos.done[DEATH] += 1
            raise InterruptionError
        at, fault = message.metadata.dst_node_id, self._fault(message)
        if fault.startswith(("its process ends", "it loses")) and at not in self._lost:
            self._lost.add(at)
            make_process.cache_clear()
            if fault.startswith("it loses"):
                for path in cache_folder().glob("run-*/base-*"):
                    path.unlink()
        reply = super()._answer(message)
        if reply.has_error():
            if reply.error.code in (MISSING_BASE, MISSING_STATE):
                self._missing.add(at)
            return reply
        report = Report.read(reply.content)
        self._before[at][report.server_round] = Report.read(reply.content)
        spoilt = self._spoil(fault, report, at)
        if spoilt is not None:
            reply.content = spoilt.content()
        elif fault == "":
            self._late = [*self._late, reply][-3:]
        return reply

    def _spoil(self, fault: str, report: Report, at: int) -> Report | None:
        if fault == "it answers what it answered before":
            return self._before[at][self._replies(at)[-1]]
        if fault == "it answers the other phase":
            others = [r for r in self._before[at].values() if r.phase != report.phase]
            report = others[-1] if others else report
            report.server_round = self._round
            if not others:
                report.phase += 1
            return report
        if fault == "it has another mask":
            report.fingerprint = "f00d"
            return report
        if fault == "it answers half the bytes":
            array = report.update
            half = array.data[: len(array.data) // 2]
            report.update = Array(array.dtype, array.shape, array.stype, half)
            return report
        return None


def survive(config: Config, chaos: Chaos, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a run to its end, however often it takes."""
    train_client = Trainer.train_client
    clock = Clock()
    grid = ChaosGrid(config, chaos)

    def train(self: Trainer, client: int, *arguments: Any) -> ClientUpdate:
        fault = grid.fails.get(client)
        if fault == ONE_CLIENT:
            raise ClientError("no examples left")
        if fault == "it raises":
            raise OSError("no space left")
        return train_client(self, client, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_client", train)
        patch.setattr(fleet, "time", clock)
        patch.setattr(collect, "time", clock)
        directory = Path(str(config["run.dir"]))
        while not (directory / "summary.json").exists():
            with suppress(InterruptionError, TooFewRepliesError):
                start(config, grid)
            make_process.cache_clear()
            if list_checkpoints(directory):
                config = resumed(config)
            else:  # it died in its first round
                shutil.rmtree(directory)
            grid = ChaosGrid(config, chaos)
    return directory


def make_whole(
    config: Config, lost: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make the run on one node without a fault, and without the clients lost."""
    train_client = Trainer.train_client

    def train(
        self: Trainer,
        client: int,
        state: Any,
        phase: Any,
        server_round: int,
        *until: float,
    ) -> ClientUpdate:
        if client in lost.get(server_round, ()):
            raise ClientError("left out")
        return train_client(self, client, state, phase, server_round, *until)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_client", train)
        return start(config, Grid(config))


CODED: Config = INT8 | LOSSLESS | TOP
CASES: dict[str, tuple[tuple[str, ...], Config]] = {
    "harmless": (HARMLESS, CODED),
    "all": (HARMLESS + tuple(HARMFUL), {}),
    "all-coded": (HARMLESS + tuple(HARMFUL), CODED),
}


def make(corpus: Path, models: dict[str, Path], directory: Path) -> Config:
    return make_config(corpus, models["bert"], directory) | {
        "method": "slora",
        "rounds": 48,
        "sparse.rounds": 24,
        "clients.count": CLIENTS,
        "clients.per-round": 10,
        "clients.min-replies": 4,
        "clients.deadline": 200.0,
        "run.eval-every": 10,
    }


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the directory of a coded run that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    config = make(corpus, tiny_models, directory) | CODED
    return start(config, Grid(config))


@pytest.mark.parametrize("case", CASES)
def test_a_run_through_random_faults_ends_as_the_rules_say(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    undisturbed: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds, changes = CASES[case]
    config = make(corpus, tiny_models, tmp_path / "run") | changes
    chaos = Chaos(kinds, random.Random(7))
    directory = survive(config, chaos, monkeypatch)
    print(sum(chaos.done.values()), "faults:", dict(chaos.done))
    assert sum(chaos.done.values()) >= 200
    assert {*kinds, DEATH} <= {*chaos.done}
    assert chaos.done[DEATH] >= 3
    # What an interrupted attempt had told is gone with it.
    told = [
        ([number, at, clients], fault)
        for number, faults in chaos.told.items()
        for at, clients, fault in faults
    ]
    found = [
        ([e["round"], e["node"], e["clients"]], e["reason"])
        for e in events(directory, "failure")
    ]
    by_place = itemgetter(0)
    for (place, fault), (other, reason) in zip(
        sorted(told, key=by_place), sorted(found, key=by_place), strict=True
    ):
        assert place == other
        assert re.search(HARMFUL[fault], reason)

    whole = undisturbed
    if told:
        whole = make_whole(elsewhere(config), chaos.lost, monkeypatch)
        assert any(len(e["clients"]) < len(e["cohort"]) for e in events(whole, "round"))
        assert changes != CODED or differ(final(whole), final(undisturbed))
    for name in ("last", "averaged", "base", "best"):
        assert not differ(final(directory, name), final(whole, name)), name
    assert without_traffic(files(directory)) == without_traffic(files(whole))
    of_rounds = [
        [without(event, "payload_bytes") for event in events(d, "round")]
        for d in (directory, whole)
    ]
    assert of_rounds[0] == of_rounds[1]
    assert uploads(directory) == uploads(whole)


def without_traffic(found: dict[str, Any]) -> dict[str, Any]:
    """Return exported files; what failed nodes were sent counts in the card's row."""
    card = found["adapter/README.md"]
    assert re.search(rb"^\| traffic \|", card, re.MULTILINE)
    left = re.sub(rb"^\| traffic \|.*$", b"", card, flags=re.MULTILINE)
    return found | {"adapter/README.md": left}


def uploads(directory: Path) -> dict[str, tuple[str, str]]:
    """Return the clients and bytes of each round's last attempt."""
    return {
        row["round"]: (row["clients"], row["payload_bytes"])
        for row in ledger(directory)
        if row["direction"] == "up"
    }
