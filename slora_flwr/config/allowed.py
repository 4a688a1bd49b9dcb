"""What a key allows: a test of its values, and the words for it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Allowed:
    """A constraint for pydantic's `Annotated`, with its own words for errors.

    Attributes
    ----------
    test : Callable
        Returns whether a value is allowed.
    words : Callable
        Returns what is allowed, as errors and the reference say it.
    """

    test: Callable[[Any], bool]
    words: Callable[[], str]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the annotated type, followed by the test."""
        plain = handler(source)
        return core_schema.no_info_after_validator_function(self._check, plain)

    def _check(self, value: Any) -> Any:
        if not self.test(value):
            raise ValueError(value, self.words())
        return value


def allow(words: str, test: Callable[[Any], bool]) -> Allowed:
    """Return a constraint with fixed words."""
    return Allowed(test, lambda: words)


def at_least(low: int) -> Allowed:
    """Return a constraint to finite numbers of at least `low`."""
    return allow(f"a number of at least {low}", lambda x: low <= x < math.inf)


def between(low: int, high: int) -> Allowed:
    """Return a constraint to numbers from `low` up to `high`."""
    return allow(f"a number from {low} up to {high}", lambda x: low <= x <= high)


def one_of(*names: str) -> Allowed:
    """Return a constraint to some names."""
    return allow(", ".join(names), names.__contains__)


def listed_by(list_names: Callable[[], Iterable[str]]) -> Allowed:
    """Return a constraint to names that other packages may add to."""
    return Allowed(lambda x: x in [*list_names()], lambda: ", ".join(list_names()))


POSITIVE = allow("a number above 0", lambda x: 0 < x < math.inf)
FROM_0_BELOW_1 = allow("a number from 0 below 1", lambda x: 0 <= x < 1)
FROM_0_TO_1 = allow("a number from 0 up to 1", lambda x: 0 <= x <= 1)
ABOVE_0_TO_1 = allow("a number above 0 up to 1", lambda x: 0 < x <= 1)
