"""A run's data, loaded once per process, and each client's part of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.logger import log
from numpy.typing import NDArray

from slora_flwr.backbone.load import load_tokenizer
from slora_flwr.common.text import counted
from slora_flwr.config import ConfigError, RunConfig, refuse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.data_sets import load_texts, public_classes
from slora_flwr.data.dialogues import Dialogue
from slora_flwr.data.examples import Examples
from slora_flwr.data.node_files import OwnData, load_test_texts
from slora_flwr.data.partition import Partition, make_partition
from slora_flwr.data.texts import Texts, at_most, count_common, list_classes, of_classes
from slora_flwr.data.tokens import Encoder, number, tokenise
from slora_flwr.tasks.choice import find_task


def held_out(examples: int, share: float) -> int:
    """Return how many of a client's examples it holds out; at most, if its own."""
    return round(examples * share)


def order_of(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return row numbers in the order of the texts' BLAKE2b, equal ones as they are.

    No config and no message has a say in it.
    """
    digests = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
    rows = sorted(range(len(texts)), key=digests.__getitem__)
    return np.array(rows, dtype=np.int64)


@dataclass(frozen=True)
class OwnExamples:
    """A node's own examples; the last `held` of their order are held out.

    The first `evaluated` of those are evaluated on.
    """

    source: OwnData
    examples: Examples
    order: NDArray[np.int64]
    held: int
    evaluated: int


@dataclass(frozen=True)
class Tokenised:
    """A run's shared data, tokenised.

    Attributes
    ----------
    train, test : Examples
        `train` is divided among the clients; the server evaluates on `test`.
    groups : NDArray[np.int64]
        The group of each training example, by which it is dealt to clients.
    asked : list[Dialogue]
        The test dialogues to which the server has responses generated.
    """

    train: Examples
    test: Examples
    groups: NDArray[np.int64]
    asked: list[Dialogue]


class ProcessData:
    """A run's data in one process; each part is loaded when first used.

    Parameters
    ----------
    config : RunConfig
        The run.
    classes : Sequence[str]
        The agreed label names if nodes train on their own data; otherwise empty, for
        the data set's.
    """

    def __init__(self, config: RunConfig, classes: Sequence[str] = ()) -> None:
        self._config = config
        self._task = find_task(config)
        self._agreed = list(classes)
        self._own: dict[int, OwnExamples] = {}

    @cached_property
    def _texts(self) -> tuple[Texts, Texts]:
        by, dialogues = self._config.clients.by, not self._task.has_classes
        if self._config.data.is_own:
            test = load_test_texts(self._config.data, dialogues=dialogues)
            return Texts([], []), test
        train, test = load_texts(self._config.data, by, dialogues=dialogues)
        privacy = self._config.privacy
        is_private = privacy.is_on or privacy.of_examples
        if is_private and self._task.has_classes:
            # Even a client that is the only one with a label must not show.
            known = public_classes(self._config.data, test)
            train = of_classes(train, known)
        elif both := count_common(test, train):
            warning = "data.test: %d of %d texts are trained on too"
            logging.getLogger(__name__).warning(warning, both, len(test.texts))
        return train, test

    @cached_property
    def classes(self) -> list[str]:
        """The label names; class id i is the i-th. None if the task has no classes."""
        if not self._task.has_classes:
            return []
        privacy, data = self._config.privacy, self._config.data
        if privacy.of_examples and data.is_own:  # whatever a server says
            return data.label_names
        if privacy.is_on or privacy.of_examples:
            return public_classes(self._config.data, self._texts[1])
        return self._agreed or list_classes(self._texts)

    @property
    def classes_digest(self) -> str:
        """BLAKE2b of the label names, 32 hex digits; the names need not be sent."""
        named = "\x1f".join(self.classes).encode()
        return blake2b(named, digest_size=16).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokeniser."""
        return load_tokenizer(self._config.model)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of the run's texts."""
        return self._task.encoder(self._config.data, self.tokenizer)

    @cached_property
    def tokenised(self) -> Tokenised:
        """The shared data, tokenised."""
        train, test = self._texts
        named = train.groups or train.labels
        known = self.classes if named is train.labels else []
        groups = number(named, known or sorted({*named}))
        asked = self._config.run.generate
        found = Tokenised(
            tokenise(self.encoder, self.classes, train),
            tokenise(self.encoder, self.classes, test),
            groups,
            at_most(asked, test).dialogues if asked else [],
        )
        del self.__dict__["_texts"]
        return found

    @cached_property
    def partition(self) -> Partition:
        """The assignment of training rows to clients."""
        clients = self._config.clients
        groups = self.tokenised.groups
        return make_partition(
            groups,
            int(groups.max(initial=-1)) + 1,
            count=clients.count,
            partitioner=clients.partitioner,
            alpha=clients.alpha,
            classes=clients.classes,
            examples=clients.examples,
            min_examples=clients.min_examples,
            seed=self._config.seed,
        )

    @cached_property
    def partition_digest(self) -> str:
        """BLAKE2b of the clients' sizes and of some clients' rows, 32 hex digits."""
        sizes = self.partition.sizes
        digest = blake2b(sizes.astype("<i8").tobytes(), digest_size=16)
        for client in (0, len(sizes) // 2, len(sizes) - 1):
            digest.update(self.partition.indices(client).astype("<i8").tobytes())
        return digest.hexdigest()

    def check(self) -> None:
        """Check what can be known of the run's data before nodes answer.

        Raises
        ------
        ConfigError
            If its shared data cannot be dealt to the clients so, or leaves too few of
            them anything to train on; or if the server's test data has other labels
            than the nodes' may have.
        """
        data = self._config.data
        tells_none = data.is_own and self._config.privacy.of_examples
        if tells_none and self._task.has_classes and not data.labels:
            allowed = "two or more names, since privacy.unit is example and nodes tell "
            raise refuse("data.labels", data.labels, f"{allowed}no labels of theirs")
        if self._config.clients.count:
            self._check_holdout(self.partition.sizes.tolist())
        elif not self._task.has_classes:
            _ = self.tokenised  # so that a test file without use is refused
        elif data.is_own and data.test and data.labels:
            known = data.label_names
            if others := sorted({*self._texts[1].labels} - {*known}):
                raise ConfigError(
                    f"data.test is {data.test!r}, which holds the labels "
                    f"{', '.join(others)}; allowed: those of data.labels, which are "
                    f"{', '.join(known)}"
                )

    def _check_holdout(self, sizes: Sequence[int]) -> None:
        """Raise ConfigError if too few clients train; warn if some do not."""
        clients = self._config.clients
        empty = sum(held_out(size, clients.holdout) == size for size in sizes)
        if len(sizes) - empty < clients.min_replies:
            raise refuse(
                "clients.holdout",
                clients.holdout,
                f"a share that leaves clients.min-replies clients, "
                f"{clients.min_replies}, some examples, and {empty} of "
                f"{counted(len(sizes), 'client')} have nothing left to train on",
            )
        if empty:
            told = "clients.holdout leaves %d of %s nothing to train on"
            log(WARNING, told, empty, counted(len(sizes), "client"))

    def host(self, client: int, source: OwnData, folder: Path) -> None:
        """Assign a node's own data to a client; leave out rows with other labels.

        Parameters
        ----------
        client : int
            The client's id.
        source : OwnData
            The data.
        folder : Path
            Where their tokens are kept, from which the text can be read.

        Raises
        ------
        OwnDataError
            If too few would be left to train on, or to evaluate on.
        """
        for other, own in self._own.items():
            if own.source == source:
                # In its place, so that ids do not fill the memory.
                self._own[client] = self._own.pop(other)
                return
        if self._config.privacy.of_examples:
            texts = source.of_labels(self.classes)
        else:
            texts, _ = source.usable()
        if self._task.has_classes:
            texts = of_classes(texts, self.classes)
        count = len(texts.texts)
        held = source.held_out(held_out(count, self._config.clients.holdout))
        # Bounded steps read fewer, and an update tells the more of each.
        recipes = [phase.recipe for phase in make_schedule(self._config)]
        fewest = min(r.fewest_read(count - held) for r in recipes)
        source.check_count(count if self._config.privacy.of_examples else fewest)
        evaluated = source.held_out(self._config.clients.weigh(held))
        examples = tokenise(self.encoder, self.classes, texts, folder)
        order = order_of(texts.texts)
        self._own[client] = OwnExamples(source, examples, order, held, evaluated)

    def examples(self, client: int) -> tuple[Examples, Examples]:
        """Return a client's training examples, and those that it evaluates on."""
        # Hold out the last rows of an order that is independent of labels.
        if client in self._own:
            own = self._own[client]
            examples, rows = own.examples, own.order
            held, evaluated = own.held, own.evaluated
        else:
            examples, rows = self.tokenised.train, self.partition.indices(client)
            held = held_out(len(rows), self._config.clients.holdout)
            evaluated = self._config.clients.weigh(held)
            rows = rows[np.random.Philox(key=client).random_raw(len(rows)).argsort()]
        cut = len(rows) - held
        end = cut + evaluated
        return examples.select(rows[:cut]), examples.select(rows[cut:end])
