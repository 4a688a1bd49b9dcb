"""One process's resident backbone with a phase's adapter attached, and its data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.handoff import Handoff
from slora_flwr.adapters.lora import factors_size
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.common.svd import truncated_svd
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.data.examples import Examples
from slora_flwr.data.node_files import OwnData, load_test_texts
from slora_flwr.data.partition import Partition, make_partition
from slora_flwr.data.texts import (
    Task,
    Texts,
    list_classes,
    load_texts,
    make_task,
    tokenise,
)
from slora_flwr.training.attack import spoil_examples, spoil_update
from slora_flwr.training.loop import evaluate, train
from slora_flwr.training.metrics import Evaluation


class ClientError(RuntimeError):
    """One client's training failed; the others of its node are unharmed."""


@dataclass
class Trained:
    """One client's turn: its update, weight, mean loss, and examples."""

    update: State
    examples: int
    loss: float


class Worker:
    """What a process keeps between clients, rounds and phases.

    Everything is loaded when first asked for, so that a message costs no more than it
    needs.

    Parameters
    ----------
    config : RunConfig
        The run.
    classes : Sequence[str]
        The label names agreed, where nodes train on data of their own; else they are
        the data set's.
    """

    def __init__(self, config: RunConfig, classes: Sequence[str] = ()) -> None:
        self.config = config
        self._agreed = list(classes)
        self._own: dict[int, tuple[OwnData, Examples]] = {}
        self.schedule = make_schedule(config)
        self.adapter: Adapter | None = None
        self._entered: tuple[Phase, str] | None = None
        # Of the phase's states, what both sides know without a message.
        self.reference: State = {}
        # The last states that came, as `Codec.write` gave them, by their digests.
        self.received: dict[str, bytes] = {}
        self._patch: BaseWeights | None = None

    @cached_property
    def _texts(self) -> tuple[Texts, Texts]:
        if self.config.data.is_own:
            return Texts([], []), load_test_texts(self.config.data)
        return load_texts(self.config.data)

    @cached_property
    def classes(self) -> list[str]:
        """The label names; class id i is the i-th."""
        return self._agreed or list_classes(self._texts)

    @cached_property
    def backbone(self) -> Backbone:
        """The resident backbone."""
        config, labels = self.config, len(self.classes)
        backbone = load_backbone(config.model, labels, config.seed, config.lora.targets)
        _check_fit(config, backbone)
        return backbone

    @cached_property
    def task(self) -> Task:
        """The tokenised task."""
        tokenizer = self.backbone.tokenizer
        task = make_task(self.config.data, tokenizer, self._texts, self.classes)
        del self.__dict__["_texts"]
        return task

    @cached_property
    def partition(self) -> Partition:
        """Who owns which rows of the training data."""
        clients = self.config.clients
        return make_partition(
            self.task.train.labels,
            len(self.task.classes),
            count=clients.count,
            partitioner=clients.partitioner,
            alpha=clients.alpha,
            classes=clients.classes,
            examples=clients.examples,
            min_examples=clients.min_examples,
            seed=self.config.seed,
        )

    @cached_property
    def partition_digest(self) -> str:
        """BLAKE2b of the clients' sizes and of some clients' rows, 32 hex digits."""
        sizes = self.partition.sizes
        digest = blake2b(sizes.astype("<i8").tobytes(), digest_size=16)
        for client in (0, len(sizes) // 2, len(sizes) - 1):
            digest.update(self.partition.indices(client).astype("<i8").tobytes())
        return digest.hexdigest()

    def enter(
        self, phase: Phase, patch: BaseWeights | None = None, patch_digest: str = ""
    ) -> Adapter:
        """Attach a phase's adapter over its base, unless it is attached already.

        Parameters
        ----------
        phase : Phase
            One of the schedule's.
        patch : BaseWeights or None
            The base, None for W_0.
        patch_digest : str
            Names the patch; empty for none.
        """
        if not self.has_entered(phase, patch_digest):
            self.leave()
            if patch is None and phase.changes_base:
                patch = BaseWeights()  # keeps W_0 aside
            if patch is not None:
                patch.apply(self.backbone)
                self._patch = patch
            frozen = patch.a if patch is not None and patch.a else None
            self.adapter = phase.adapter_type.from_config(self.config, frozen)
            self.adapter.attach(self.backbone)
            self._entered = (phase, patch_digest)
            self.reference = {}
            if self.config.download.dtype != "float32":
                self.reference = self._known(phase, patch)
        assert self.adapter is not None
        return self.adapter

    def _known(self, phase: Phase, patch: BaseWeights | None) -> State:
        """Give what is known of states: W_0's values, and the factors of the base."""
        assert self.adapter is not None
        known = self.adapter.known()
        # A base that moves may have come without the factors that it began with.
        if patch is not None and not phase.changes_base:
            named = {f"{n}.lora_A": t for n, t in patch.a.items()}
            named |= {f"{n}.lora_B": t for n, t in patch.b.items()}
            known |= {n: t for n, t in named.items() if n in self.adapter.shapes()}
        return known

    def known_of(self, positions: Mapping[str, NDArray[np.int64]]) -> State:
        """Give W_0's values at positions of target matrices, as a patch names them."""
        self.leave()
        return {
            f"{name}.values": weight.reshape(-1)[torch.from_numpy(positions[name])]
            for name, weight in self.base_weights().items()
            if name in positions
        }

    def receive(self, digest: str, data: bytes) -> None:
        """Keep a state for the differences to it, and the one that came before.

        Nodes of one process can be told of different ones.
        """
        self.received.pop(digest, None)
        before = list(self.received.items())[-1:]
        self.received = {**dict(before), digest: data}

    def change_base(self, moves: Sequence[State], first: int, digest: str) -> None:
        """Change the base under the attached adapter.

        Parameters
        ----------
        moves : Sequence[State]
            What some rounds of the phase changed of it, one after the other.
        first : int
            The round within the phase of the first move.
        digest : str
            Names the base then.
        """
        assert self.adapter is not None
        assert self._entered is not None
        phase, self._entered = self._entered[0], None  # until it is whole again
        self.adapter.detach()
        for number, move in enumerate(moves, start=first):
            self.adapter.change(self.backbone, move, number)
        self.adapter.attach(self.backbone)
        self._entered = (phase, digest)

    def change_shapes(self, values: int) -> dict[str, torch.Size]:
        """Give the layout of a move of so many values."""
        assert self.adapter is not None
        rank = values // factors_size(1, self.backbone)
        return self.adapter.change_shapes(self.backbone, rank)

    @property
    def target_shapes(self) -> dict[str, torch.Size]:
        """The layout of the base's target matrices."""
        return {name: m.weight.shape for name, m in self.backbone.targets.items()}

    def base_weights(self) -> State:
        """Copy the base's target matrices, float32 on the CPU."""
        return {
            name: module.weight.detach().to("cpu", torch.float32, copy=True)
            for name, module in self.backbone.targets.items()
        }

    def has_entered(self, phase: Phase, patch_digest: str) -> bool:
        """Tell whether the phase's adapter is attached over that base."""
        return self._entered == (phase, patch_digest)

    def leave(self) -> None:
        """Make the backbone W_0 again."""
        if self.adapter is not None:
            self.adapter.detach()
        if self._patch is not None:
            self._patch.remove(self.backbone)
        self.adapter, self._patch, self._entered = None, None, None

    def hand_over(self, state: State, rounds: int, phase: Phase) -> Handoff:
        """End the sparse phase that is attached, after so many rounds.

        Nothing is attached afterwards, and W_0 is resident.
        """
        assert self.adapter is not None
        positions, values = self.adapter.learned(state, rounds)
        self.leave()
        head = {name: state[name] for name in self.backbone.head}
        adapter_type = phase.adapter_type
        primed: Handoff = adapter_type.prime(
            self.config, self.backbone, positions, values, head
        )
        return primed

    def kept_energy(self, state: State, rounds: int) -> float:
        """Give the share of the sparse deltas' energy that a handoff now would keep.

        It is the mean over the target matrices, as the handoff reports it.
        """
        sparse = self.adapter
        assert sparse is not None
        positions, values = sparse.learned(state, rounds)
        sparse.detach()
        first = self.base_weights() if self._patch is None else self._patch.before
        sparse.attach(self.backbone)
        energies = []
        for name, weight in first.items():
            at = torch.from_numpy(positions[name])
            delta = (values[name] - weight.reshape(-1).cpu()[at]).double().numpy()
            m, n = weight.shape
            rank = self.config.lora.rank
            energies.append(truncated_svd(positions[name], delta, (m, n), rank).energy)
        return fmean(energies)

    def host(self, client: int, source: OwnData) -> None:
        """Make a node's own data a client's; rows of other labels are left out."""
        if client in self._own and self._own[client][0] == source:
            return
        texts, _ = source.load()
        known = set(self.classes)
        texts = texts.select(np.array([label in known for label in texts.labels]))
        tokenizer = self.backbone.tokenizer
        examples = tokenise(self.config.data, tokenizer, self.classes, texts)
        self._own[client] = (source, examples)

    def examples(self, client: int) -> tuple[Examples, Examples]:
        """Give a client's examples: to train on, and held out for evaluation."""
        if client in self._own:
            examples = self._own[client][1]
            rows = np.arange(len(examples))
        else:
            examples, rows = self.task.train, self.partition.indices(client)
        # The last ones, of an order that has nothing to do with labels.
        held = round(len(rows) * self.config.clients.holdout)
        cut = len(rows) - held
        order = np.random.Philox(key=client).random_raw(len(rows)).argsort()
        rows = rows[order]
        return examples.select(rows[:cut]), examples.select(rows[cut:])

    def train_client(
        self, client: int, state: State, phase: Phase, server_round: int
    ) -> Trained:
        """Train one client from a state, with the phase's adapter attached.

        Raises
        ------
        ClientError
            If the client has no examples or its update is not finite.
        """
        assert self.adapter is not None
        examples, _ = self.examples(client)
        if not len(examples):
            raise ClientError("no examples")
        examples = spoil_examples(self.config, client, examples, len(self.classes))
        state = self._own_ranks(client, state)
        self.adapter.load(state)
        rng_key = (self.config.seed, server_round, client)
        loss = train(self.backbone, self.adapter, examples, phase.recipe, rng_key)
        after = self.adapter.state()
        update = {n: after[n].sub_(state[n]) for n in self.adapter.returned()}
        update = spoil_update(self.config, client, update)
        if not all(bool(tensor.isfinite().all()) for tensor in update.values()):
            raise ClientError(f"the update is not finite (loss {loss:.3g})")
        return Trained(update, len(examples), loss)

    def _own_ranks(self, client: int, state: State) -> State:
        """Cut low-rank factors to a client's rank."""
        assert self.adapter is not None
        rank_of = self.adapter.client_ranks(self.config)
        return self.adapter.cut(state, rank_of(client)) if rank_of else state

    def evaluate_client(self, client: int, state: State) -> Evaluation | None:
        """Evaluate a state on a client's held-out examples, None without any."""
        assert self.adapter is not None
        _, held = self.examples(client)
        if not len(held):
            return None
        self.adapter.load(self._own_ranks(client, state))
        return evaluate(self.backbone, held, self.config.train.precision)

    def evaluate_test(self, state: State) -> Evaluation | None:
        """Evaluate a state on the server's test data, None without any."""
        if not len(self.task.test):
            return None
        assert self.adapter is not None
        self.adapter.load(state)
        return evaluate(self.backbone, self.task.test, self.config.train.precision)


def _check_fit(config: RunConfig, backbone: Backbone) -> None:
    """Refuse what this backbone cannot do, before any client is asked to."""
    for name, module in backbone.model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions start after the padding index.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            most = module.num_embeddings - skipped
            if config.data.max_length > most:
                raise ConfigError(
                    f"data.max-length is {config.data.max_length}; allowed: 4 to "
                    f"{most}, the positions of model {config.model.name!r}"
                )
    for phase in make_schedule(config):
        phase.adapter_type.check_fit(config, backbone)
