"""Tables of what a run's last state predicts of each class of the server's test data.

With many classes they show the worst ones and the pairs that are confused most often.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slora_flwr.common.text import printable
from slora_flwr.reports.page import LISTED, NOTHING, Cell, Column, Section, Table
from slora_flwr.runs.events import ClassRecord
from slora_flwr.runs.reader import RecordedRun

MATRIX = 20  # most classes of a matrix, and of a table that shows all
PAIRS = 10  # most pairs shown
_NAME = 30  # most characters of a class's name


@dataclass(frozen=True)
class ClassFigures:
    """A class's figures, which are None where they divide by zero."""

    name: str
    examples: int
    precision: float | None
    recall: float | None
    f1: float | None

    @property
    def rank(self) -> tuple[bool, float, int]:
        """What sorts the worst class first, and those that do not occur last."""
        return self.f1 is None, self.f1 or 0.0, -self.examples


def class_sections(run: RecordedRun) -> list[Section]:
    """Return the section on classes; none without classes or evaluations."""
    last = next((done for done in reversed(run.rounds) if done.classes), None)
    if last is not None and last.classes is not None:
        return [_section(last.classes, last.round, run)]
    resolved = run.facts["resolved"]
    has_classes = resolved.get("classes") != []  # which a language model's run lacks
    if not (run.evaluated and has_classes) or resolved.get("test_examples") != 0:
        return []
    text = (
        "There are no figures by class: they are counted on the server's own test data "
        "alone, which this run has none of. What clients hold out is never counted by "
        "class."
    )
    return [Section("Classes", [text])]


def figures_by_class(found: ClassRecord, names: Sequence[str]) -> list[ClassFigures]:
    """Return precision, recall and F1 of each class, in the order of their ids."""
    return [
        ClassFigures(
            name,
            labels,
            right / predicted if predicted else None,
            right / labels if labels else None,
            2 * right / (predicted + labels) if predicted + labels else None,
        )
        for name, right, predicted, labels in zip(
            names, found.right, found.predicted, found.labels, strict=True
        )
    ]


def _section(found: ClassRecord, number: int, run: RecordedRun) -> Section:
    names = _names(run, len(found.labels))
    figures = figures_by_class(found, names)
    occurring = [one for one in figures if one.examples]
    never = sum(one.precision is None for one in occurring)
    text = (
        f"Of the server's {sum(found.labels):,} test examples after round {number}, "
        f"with {len(occurring)} of {len(names)} classes. "
        f"{never or 'None'} of these {'is' if never == 1 else 'are'} never predicted."
    )
    tables = _class_tables(sorted(figures, key=lambda one: one.rank))
    if len(names) <= MATRIX and found.is_whole:
        tables.append(_matrix(found, names))
    if found.confused:
        tables.append(_pairs(found, names))
    return Section("Classes", [text], tables=tables)


def _names(run: RecordedRun, count: int) -> list[str]:
    told = run.facts["resolved"].get("classes")
    if not isinstance(told, list) or len(told) != count:
        told = range(count)
    return [printable(name, _NAME) for name in told]


def _class_tables(figures: Sequence[ClassFigures]) -> list[Table]:
    columns = [
        Column("class", "class"),
        Column("test examples", "examples", "d"),
        Column("precision, %", "precision_percent", ".1f"),
        Column("recall, %", "recall_percent", ".1f"),
        Column("F1", "f1", ".3f"),
    ]
    rows: list[list[Cell]] = [
        [
            one.name,
            one.examples,
            None if one.precision is None else 100 * one.precision,
            None if one.recall is None else 100 * one.recall,
            one.f1,
        ]
        for one in figures[:LISTED]
    ]
    meaning = (
        "Precision: the share of its predictions that are right; recall: the share of "
        f"its examples that are found. {NOTHING}: there are none"
    )
    if len(figures) <= MATRIX:
        caption = f"Each class, the lowest F1 first. {meaning}."
        return [Table("classes", caption, columns, rows)]
    most = f", the {LISTED} with the lowest F1" if len(figures) > LISTED else ""
    return [
        Table(
            "worst-classes",
            f"The {MATRIX} classes with the lowest F1. {meaning}.",
            columns,
            rows[:MATRIX],
        ),
        Table("classes", f"All classes{most}", columns, rows, folded=True),
    ]


def _matrix(found: ClassRecord, names: Sequence[str]) -> Table:
    counts = [[0] * len(names) for _ in names]
    for class_id, right in enumerate(found.right):
        counts[class_id][class_id] = right
    for label, predicted, number in found.confused:
        counts[label][predicted] = number
    return Table(
        "confusion",
        "Confusion matrix: the number of test examples by label (rows) and prediction "
        "(columns). The more colour a cell has, the larger its share of the row.",
        [
            Column("label", "label"),
            *(Column(name, f"predicted {name}", "d") for name in names),
        ],
        [[name, *row] for name, row in zip(names, counts, strict=True)],
        shaded=True,
    )


def _pairs(found: ClassRecord, names: Sequence[str]) -> Table:
    more = "; there are others" if len(found.confused) > PAIRS else ""
    return Table(
        "confused",
        f"What is taken for what most often{more}.",
        [
            Column("label", "label"),
            Column("predicted", "predicted"),
            Column("test examples", "examples", "d"),
            Column("of the label's, %", "share_percent", ".1f"),
        ],
        [
            [names[label], names[wrong], n, 100 * n / max(1, found.labels[label])]
            for label, wrong, n in found.confused[:PAIRS]
        ],
    )
