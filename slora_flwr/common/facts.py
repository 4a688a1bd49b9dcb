"""Facts that a file holds: their types, their bounds, and an error in one line."""

from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from slora_flwr.common.text import printable

# Bounds that no run reaches, so that sums and charts of figures cannot overflow.
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Figure = Annotated[float, Field(strict=True, ge=-1e39, le=1e39, allow_inf_nan=False)]

T = TypeVar("T")


def check(kind: type[T], given: object) -> T:
    """Return a fact, or a dataclass of a dict of facts; unknown facts are ignored.

    Raises
    ------
    ValueError
        If a fact is missing, or has another type or an impossible value.
    """
    try:
        return _adapter(kind).validate_python(given)
    except ValidationError as error:
        raise ValueError(_words(error)) from None


def check_cells(kind: type[T], given: dict[str, str]) -> T:
    """Return the dataclass of a row of text; see `check`."""
    try:
        return _adapter(kind).validate_strings(given)
    except ValidationError as error:
        raise ValueError(_words(error)) from None


def _words(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = printable(".".join(map(str, first["loc"])), 100)
    if first["type"] == "missing":
        return f"{name} is missing"
    given = printable(ascii(first["input"]), 100)
    allowed = first["msg"].removeprefix("Input should be ")
    return f"{name or 'it'} is {given}; allowed: {allowed}"


# Of each kind that was checked, since one takes long to make.
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
