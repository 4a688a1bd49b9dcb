"""Partitions: which training examples each client owns.

=============== ===========================================================
``iid``          equal shares of the shuffled rows
``dirichlet``    each label is divided by Dirichlet(alpha) over clients
                 (Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022)
``pathological`` each client holds exactly ``clients.classes`` labels
                 (Li et al. 2021, https://arxiv.org/abs/2102.02079)
``natural``      each client has the rows of one group, such as an author
``virtual``      each client's rows are drawn on demand, so that there may
                 be far more clients than rows
=============== ===========================================================

The first three use flwr-datasets' partitioners over shuffled rows; their clients are
disjoint. All nodes of a federation must compute the same partition. NumPy does not
keep its distributions' values stable across releases, so all nodes need the same
versions of NumPy and flwr-datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slora_flwr.common.code_digest import code_digest
from slora_flwr.common.random import partition_generator, partition_key
from slora_flwr.config import PARTITIONERS, ConfigError
from slora_flwr.data.kept import keep

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Int64Array = npt.NDArray[np.int64]

# Beyond these, NumPy's Dirichlet sampler exceeds the range of float64. Within them, the
# skew already reaches its extremes: one client per label, or none at all.
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6
DIRICHLET_DRAWS = 10


class PartitionError(ConfigError):
    """The data does not allow such a partition."""


class Partition(Protocol):
    """The rows of the training split that each client owns."""

    @property
    def moved(self) -> int:
        """Number of examples moved between clients to give each the minimum."""

    @property
    def sizes(self) -> Int64Array:
        """Number of examples of each client, shape (clients,)."""

    def indices(self, client: int) -> Int64Array:
        """Return the sorted row numbers of the client's examples."""


@dataclass(frozen=True)
class Split:
    """A partition into disjoint clients, held as one array of rows.

    Parameters
    ----------
    rows : Int64Array
        Row numbers, client after client, sorted within each.
    offsets : Int64Array
        Client `i` owns ``rows[offsets[i] : offsets[i + 1]]``; shape (clients + 1,).
    moved : int
        Number of examples moved between clients to give each `clients.min-examples`.
    """

    rows: Int64Array
    offsets: Int64Array
    moved: int = 0

    @property
    def sizes(self) -> Int64Array:
        """Number of examples of each client."""
        return np.diff(self.offsets)

    def indices(self, client: int) -> Int64Array:
        """Return the sorted row numbers of the client's examples."""
        _check_client(client, len(self.offsets) - 1)
        return self.rows[self.offsets[client] : self.offsets[client + 1]]


class Virtual:
    r"""A partition whose clients are functions of (seed, client id), without storage.

    A client's label mixture is :math:`q \sim Dir(\alpha K p)`, with `p` the label
    frequencies of the data and `K` the number of labels in it. The mean over clients is
    the data's own mixture. On balanced data this is the symmetric Dir(alpha), the skew
    of `dirichlet` at the same alpha. (Hsu et al. 2019,
    https://arxiv.org/abs/1909.06335, write it as Dir(alpha' p).) Label counts are
    multinomial in `q`, and a label's rows are drawn without replacement. If a client
    needs more rows of a label than the data holds, each row is repeated equally often,
    give or take one. Clients overlap: they draw from the same rows.

    Parameters
    ----------
    labels : Int64Array
        Label of each training row.
    count, alpha, examples, seed
        As for `make_partition`.
    """

    moved = 0

    def __init__(
        self, labels: Int64Array, count: int, alpha: float, examples: int, seed: int
    ) -> None:
        totals = np.bincount(labels)
        present = np.flatnonzero(totals)
        self._totals = totals[present]
        self._starts = np.cumsum(self._totals) - self._totals
        # The narrowest type lets NumPy use radix sort: 10 times faster for long data.
        narrow = labels.astype(np.min_scalar_type(len(totals)))
        self._by_label = np.argsort(narrow, kind="stable").astype(np.int64, copy=False)
        self._concentration = alpha * len(present) * self._totals / len(labels)
        self._seed = seed
        self._examples = examples
        self.sizes: Int64Array = np.broadcast_to(np.int64(examples), (count,))

    def indices(self, client: int) -> Int64Array:
        """Return the sorted row numbers of the client's examples."""
        _check_client(client, len(self.sizes))
        rng = partition_generator(self._seed, f"client {int(client)}")
        counts = rng.multinomial(self._examples, rng.dirichlet(self._concentration))
        rows = []
        for label in np.flatnonzero(counts):
            start, total = self._starts[label], self._totals[label]
            whole, rest = divmod(int(counts[label]), int(total))
            if whole:
                rows.append(np.tile(np.arange(start, start + total), whole))
            rows.append(start + rng.choice(total, rest, replace=False, shuffle=False))
        return np.sort(self._by_label[np.concatenate(rows)])


def make_partition(
    labels: npt.NDArray[Any],
    num_classes: int,
    *,
    count: int,
    partitioner: str,
    alpha: float,
    classes: int,
    examples: int,
    min_examples: int,
    seed: int,
) -> Partition:
    """Divide the training rows among the clients.

    Parameters
    ----------
    labels : NDArray
        Class id of each training row, shape (rows,).
    num_classes : int
        Number of classes of the task; `labels` may lack some.
    count : int
        Number of clients.
    partitioner : str
        One of `PARTITIONERS`.
    alpha : float
        Skew of `dirichlet` and `virtual`: small is skewed, large is even.
    classes : int
        Labels per client of `pathological`. If there are fewer clients than labels,
        some labels may remain unassigned.
    examples : int
        Examples per client of `virtual`.
    min_examples : int
        Minimum number of examples of any client.
    seed : int
        The partition is a function of the data and this seed.

    Returns
    -------
    Partition
        A `Split`, or for `virtual` a `Virtual`.

    Raises
    ------
    PartitionError
        If no such partition exists; the message names the run config key.

    Notes
    -----
    A `Split` is made once and read from the cache by later processes, which do not have
    to import flwr-datasets.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise PartitionError(
            f"labels must be one integer per row, got {labels.dtype} {labels.shape}"
        )
    labels = labels.astype(np.int64, copy=False)
    if len(labels) == 0:
        raise PartitionError("data.train has no rows: there is nothing to partition")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise PartitionError(
            f"labels run from {labels.min()} to {labels.max()}, "
            f"but must be class ids from 0 to {num_classes - 1}"
        )
    if partitioner not in PARTITIONERS:
        raise PartitionError(
            f'clients.partitioner = "{partitioner}": must be one of '
            + ", ".join(f'"{name}"' for name in PARTITIONERS)
        )
    for key, value in (("count", count), ("min-examples", min_examples)):
        if value < 1:
            raise PartitionError(f"clients.{key} = {value}: must be at least 1")
    if partitioner in ("dirichlet", "virtual") and not MIN_ALPHA <= alpha <= MAX_ALPHA:
        raise PartitionError(
            f"clients.alpha = {alpha}: must be above 0, "
            f"from {MIN_ALPHA:g} to {MAX_ALPHA:g}"
        )

    if partitioner == "virtual":
        if not min_examples <= examples <= len(labels):
            raise PartitionError(
                f"clients.examples = {examples}: must be from {min_examples} "
                f"(clients.min-examples) to {len(labels)} (the training rows)"
            )
        return Virtual(labels, count, alpha, examples, seed)

    if count > len(labels):
        raise PartitionError(
            f"clients.count = {count}: must be at most {len(labels)}, the number of "
            'training rows; clients.partitioner = "virtual" allows more'
        )
    if count * min_examples > len(labels):
        raise PartitionError(
            f"clients.min-examples = {min_examples}: {count} clients would need "
            f"{count * min_examples} of {len(labels)} training rows; must be at most "
            f"{len(labels) // count}"
        )
    # Imported here, since a node that fails early does not need it.
    from safetensors.numpy import load, save

    given = partitioner, count, alpha, classes, min_examples, seed
    kept = keep(
        f"partition-{_digest(labels, given)}.safetensors",
        lambda: save(_divide(labels, *given)),
    )
    found = load(kept)
    return Split(found["rows"], found["offsets"], int(found["moved"]))


def _digest(labels: Int64Array, given: tuple[object, ...]) -> str:
    """Return 32 hex digits: BLAKE2b of all that a partition follows from."""
    made_by = [code_digest(), *map(metadata.version, ("numpy", "flwr-datasets"))]
    digest = blake2b(repr([made_by, given]).encode(), digest_size=16)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _divide(
    labels: Int64Array,
    partitioner: str,
    count: int,
    alpha: float,
    classes: int,
    min_examples: int,
    seed: int,
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the fields of a `Split`."""
    # The library divides a label's rows in their order, so in a corpus sorted by date
    # or source each client would get one stretch.
    rng = partition_generator(seed, "shuffle")
    order = rng.permutation(len(labels)).astype(np.int64)
    if partitioner == "iid":
        parts, moved = _iid(labels[order], count), 0
    elif partitioner == "natural":
        parts, moved = _natural(labels[order], count, min_examples), 0
    elif partitioner == "pathological":
        parts = _pathological(labels[order], count, classes, min_examples, seed)
        moved = 0
    else:
        parts, moved = _dirichlet(labels[order], count, alpha, min_examples, seed)
    return {
        "rows": np.concatenate([np.sort(order[part]) for part in parts]),
        "offsets": np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64),
        "moved": np.array(moved),
    }


def _iid(labels: Int64Array, count: int) -> list[Int64Array]:
    from flwr_datasets.partitioner import IidPartitioner

    return _parts(IidPartitioner(count), labels, count)


def _natural(labels: Int64Array, count: int, min_examples: int) -> list[Int64Array]:
    """Give each client a group of its own: the largest first, then the lower id."""
    sizes = np.bincount(labels)
    chosen = np.argsort(-sizes, kind="stable")[:count]
    if (present := int((sizes > 0).sum())) < count:
        raise PartitionError(
            f"clients.count = {count}: must be at most {present}, the values of the "
            "column that clients.by names, or of the labels if it names none"
        )
    if (fewest := int(sizes[chosen].min())) < min_examples:
        raise PartitionError(
            f"clients.min-examples = {min_examples}: client {count - 1} has {fewest}; "
            "lower it, or clients.count"
        )
    return [np.flatnonzero(labels == group) for group in chosen]


def _pathological(
    labels: Int64Array, count: int, classes: int, min_examples: int, seed: int
) -> list[Int64Array]:
    present = np.flatnonzero(np.bincount(labels))
    if not 1 <= classes <= len(present):
        raise PartitionError(
            f"clients.classes = {classes}: must be from 1 to {len(present)}, "
            "the number of labels in the training rows"
        )
    from flwr_datasets.partitioner import PathologicalPartitioner

    # A client's first label rotates, so that all labels occur if there are as many
    # clients; the others are drawn. If each client has all labels, nothing is drawn,
    # since the library's rejection sampling would take long.
    mode = "deterministic" if classes == len(present) else "first-deterministic"
    library = PathologicalPartitioner(
        count,
        "label",
        classes,
        mode,
        shuffle=False,
        seed=partition_key(seed, "pathological"),
    )
    try:
        parts = _parts(library, labels, count)
    except ValueError as error:
        # The library's message names its own arguments. The only case left is a label
        # with fewer rows than the clients that should hold it.
        raise PartitionError(
            f"clients.classes = {classes}: a label has fewer rows than the clients, of "
            f"clients.count = {count}, that should hold it; lower either, or use "
            f'clients.partitioner = "dirichlet" ({error})'
        ) from error
    sizes = [len(part) for part in parts]
    if min(sizes) < min_examples:
        raise PartitionError(
            f"clients.min-examples = {min_examples}: client {np.argmin(sizes)} gets "
            f"{min(sizes)} with {classes} labels for each of {count} clients; must be "
            f"at most {min(sizes)}, or lower clients.count"
        )
    return parts


def _dirichlet(
    labels: Int64Array, count: int, alpha: float, min_examples: int, seed: int
) -> tuple[list[Int64Array], int]:
    """Draw with the library; top up short clients if drawing again does not help.

    Drawing until no client is short is the usual practice, but is hopeless if alpha is
    small for the number of clients. At alpha 0.01, 100 clients and 20 equal labels, the
    mean draw leaves 23 clients empty, and 2,000 draws never fewer than 9. So after
    `DIRICHLET_DRAWS` draws, or a first one that is far off, the first draw is kept.
    Each short client, by id, then gets random rows of the client that is largest at
    that time: from one owner if that suffices, so that the additions are skewed too.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    def draw(attempt: int) -> list[Int64Array]:
        # The library's own retries take quadratic time in the number of clients. Its
        # self-balancing would change the meaning of alpha, and divides by zero once all
        # clients with a share of a label are full.
        library = DirichletPartitioner(
            count,
            "label",
            float(alpha),
            min_partition_size=0,
            self_balancing=False,
            shuffle=False,
            seed=partition_key(seed, f"dirichlet {attempt}"),
        )
        return _parts(library, labels, count)

    for attempt in range(DIRICHLET_DRAWS):
        drawn = draw(attempt)
        short = sum(len(part) < min_examples for part in drawn)
        if short == 0:
            return drawn, 0
        if attempt == 0:
            parts = drawn
            # One draw in about exp(mean number of short clients) has none: too rare.
            if short > 10:
                break
    sizes = np.array([len(part) for part in parts])
    rng = partition_generator(seed, "top up")
    moved = 0
    for client in np.flatnonzero(sizes < min_examples):
        while sizes[client] < min_examples:
            # count * min_examples fits the data, so the largest client can spare some.
            largest = sizes.argmax()
            take = min(min_examples - sizes[client], sizes[largest] - min_examples)
            mixed = rng.permutation(parts[largest])
            parts[client] = np.concatenate([parts[client], mixed[:take]])
            parts[largest] = mixed[take:]
            sizes[client] += take
            sizes[largest] -= take
            moved += int(take)
    return parts, moved


def _parts(library: Partitioner, labels: Int64Array, count: int) -> list[Int64Array]:
    """Return the rows of each client, as positions in `labels`."""
    import pyarrow as pa
    from datasets import Dataset

    class Rows(Dataset):
        """A data set that yields NumPy labels and returns the selected row numbers.

        A plain `Dataset` yields its labels row by row and builds a table per client,
        which takes minutes for a million rows.
        """

        def __getitem__(self, key: Any) -> Int64Array:
            return labels

        def select(self, indices: Any, **_: Any) -> Int64Array:
            return np.asarray(indices, dtype=np.int64)

    library.dataset = Rows(pa.table({"label": labels}))
    return [library.load_partition(client) for client in range(count)]


def _check_client(client: int, count: int) -> None:
    if not 0 <= client < count:
        raise IndexError(f"client {client}: must be from 0 to {count - 1}")
