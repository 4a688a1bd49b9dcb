"""docs/guides/large-models.md: its tables are what docs/plan_large_models.py writes."""

from collections.abc import Callable, Iterator

import pytest

from docs import plan_large_models

PAGE = plan_large_models.PAGE.read_text().splitlines()
MODELS = [*plan_large_models.MODELS]


# A plan of 70 billion weights' memory takes a minute.
@pytest.mark.parametrize(
    ("write", "names"),
    [
        (plan_large_models.write_memory, ["Llama-3.2-1B", "Mistral-7B-v0.3"]),
        (plan_large_models.write_transfers, MODELS),
    ],
)
def test_the_page_has_what_is_planned(
    write: Callable[[list[str]], Iterator[str]], names: list[str]
) -> None:
    head, rule, *rows = write(names)
    first = PAGE.index(head)
    assert PAGE[first + 1] == rule
    end = PAGE.index("", first)
    shown = PAGE[first + 2 : end]
    assert len(shown) == 4 * len(MODELS)
    assert [row for row in shown if row.split(" | ")[0][2:] in names] == rows
