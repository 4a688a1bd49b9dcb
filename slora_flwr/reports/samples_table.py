"""The answers to some of the test data that are printed at the end of a run."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from slora_flwr.common.text import printable
from slora_flwr.tasks.base import Sample

# Characters of each text.
_MOST = 300


def samples_table(before: Sequence[Sample], after: Sequence[Sample]) -> Table:
    """Return a table of what the pretrained and the trained model say to prompts.

    Parameters
    ----------
    before, after : Sequence[Sample]
        The answers to the same prompts.
    """
    table = Table(title="answers to test prompts", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for first, last in zip(before, after, strict=True):
        for name, text in (
            ("prompt", first.prompt),
            ("right", first.right),
            ("before", first.said),
            ("after", last.said),
        ):
            table.add_row(name, Text(printable(text, _MOST)))
        table.add_section()
    return table
