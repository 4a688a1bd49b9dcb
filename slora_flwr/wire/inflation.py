"""A bound on the bytes of a message while Flower inflates it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from slora_flwr.wire.packing import PayloadError

# Limit on a message's bytes without those of its arrays. Flower's records take up to 50
# times as many. A node that hosts half a million clients describes them in less.
MOST_RECORD_BYTES = 8 * 2**20


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Refuse a message whose arrays have more than `most` bytes in all.

    An array lists its chunks, and may list one again and again: a megabyte then becomes
    gigabytes. Records may do the same with arrays, and a message with records. So sizes
    are added up, each as often as it is named, before Flower copies anything. What is
    not in arrays is bounded by `MOST_RECORD_BYTES`.

    The bound is a change of Flower's registry, which all threads share; a ServerApp's
    process inflates messages in the thread that pulls them, and in no other.

    Raises
    ------
    PayloadError
        From Flower's inflation within the context, if a message is larger.
    """
    kinds = dict(inflatable_class_registry)
    sizes = _Sizes(most)
    for name, kind in kinds.items():
        bounded_kind: Any = _BoundedKind(kind, sizes)
        inflatable_class_registry[name] = bounded_kind
    try:
        yield
    finally:
        inflatable_class_registry.update(kinds)


class _Sizes:
    """The bytes of a message's objects: those in arrays, and the rest."""

    def __init__(self, most: int) -> None:
        self._most, self._of = most, dict[int, tuple[int, int]]()
        self._data = self._rest = 0

    def add(self, data: int, rest: int) -> None:
        """Add what is copied or parsed.

        Raises
        ------
        PayloadError
            If it is too much in all.
        """
        self._data, self._rest = self._data + data, self._rest + rest
        self._check(self._data, self._rest)

    def named(self, objects: Iterable[InflatableObject]) -> tuple[int, int]:
        """Return the sizes of objects, each as often as it is given.

        Raises
        ------
        PayloadError
            If they are too large.
        """
        data = rest = 0
        for item in objects:
            of_item = self._of[id(item)]
            data, rest = data + of_item[0], rest + of_item[1]
        self._check(data, rest)
        return data, rest

    def keep(self, item: InflatableObject, data: int, rest: int) -> None:
        """Keep the sizes of an object, which Flower keeps while it inflates others."""
        self._of[id(item)] = data, rest

    def _check(self, data: int, rest: int) -> None:
        if data > self._most:
            raise PayloadError(
                f"its arrays have {data} bytes; allowed: up to {self._most}"
            )
        if rest > MOST_RECORD_BYTES:
            raise PayloadError(
                f"its records have {rest} bytes; allowed: up to {MOST_RECORD_BYTES}"
            )


class _BoundedKind:
    """Inflate objects of one kind as Flower does, until their sizes exceed a bound."""

    def __init__(self, kind: type[InflatableObject], sizes: _Sizes) -> None:
        self._kind, self._sizes = kind, sizes

    def inflate(
        self, content: bytes, children: Mapping[str, InflatableObject] | None = None
    ) -> InflatableObject:
        kind, sizes, children = self._kind, self._sizes, dict(children or {})
        if kind is ArrayChunk:
            chunk = ArrayChunk.inflate(content, children)
            sizes.keep(chunk, len(chunk.data), 0)
            return chunk
        sizes.add(0, len(content))
        names = _names(kind, content)
        data, rest = sizes.named(children[name] for name in names)
        if kind is Array:
            sizes.add(data, 0)
        item = kind.inflate(content, children)
        sizes.keep(item, data, rest + len(content))
        return item


def _names(kind: type[InflatableObject], content: bytes) -> Iterable[str]:
    """Return the ids of the objects that an object names, some more than once."""
    ids = get_object_children_ids_from_object_content(content)
    if kind is Array:
        body = json.loads(get_object_body(content, kind))
        return (ids[i] for i in body["arraychunk_ids"])
    if kind in (ArrayRecord, RecordDict):
        return dict.values(json.loads(get_object_body(content, kind)))
    return ids
