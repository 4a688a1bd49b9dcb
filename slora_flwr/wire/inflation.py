"""A bound on the bytes of arrays while Flower inflates a message."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from slora_flwr.wire.packing import PayloadError


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Refuse arrays that have more than `most` bytes in all.

    An array lists its chunks, and may list one again and again: a megabyte then becomes
    gigabytes. So sizes are added up before Flower copies the chunks.

    Raises
    ------
    PayloadError
        From Flower's inflation within the context, if arrays are larger.
    """
    registry: dict[str, Any] = dict(inflatable_class_registry)
    inflatable_class_registry["Array"] = _BoundedArray(most)  # type: ignore[assignment]
    try:
        yield
    finally:
        inflatable_class_registry["Array"] = registry["Array"]


class _BoundedArray:
    """Inflate arrays as Flower's `Array` does, until their bytes exceed a bound."""

    def __init__(self, most: int) -> None:
        self._most, self._found = most, 0

    def inflate(
        self, object_content: bytes, children: Mapping[str, Any] | None = None
    ) -> Array:
        names = get_object_children_ids_from_object_content(object_content)
        body = json.loads(get_object_body(object_content, Array))
        sizes = {name: len(chunk.data) for name, chunk in (children or {}).items()}
        self._found += sum(sizes[names[i]] for i in body["arraychunk_ids"])
        if self._found > self._most:
            raise PayloadError(
                f"its arrays have {self._found} bytes; allowed: up to {self._most}"
            )
        return Array.inflate(object_content, dict(children or {}))
