"""`slora sweep`: all runs of a study, and the tables of their results."""

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from slora_flwr.common.text import csv_cell
from slora_flwr.config import Value, flatten, parse
from slora_flwr.engines.app_folder import app_folder, is_app
from slora_flwr.reports.chance import tell_warned
from slora_flwr.reports.figures import FORMS, first_of
from slora_flwr.reports.narrow_tables import print_table
from slora_flwr.runs.lock import sole_use
from slora_flwr.runs.roster import write_roster
from slora_flwr.studies.runner import Runner, StudyRun
from slora_flwr.studies.study import (
    Config,
    Score,
    Study,
    Trial,
    best_rate,
    digest_of,
    read_study,
    tune,
    varying,
)

if TYPE_CHECKING:
    from slora_flwr.tasks.base import Task

_LAST = "_last_5"  # follows a metric's name for its mean over the last evaluations
# Columns of `runs.csv`, each with its heading and format in the printed table, and
# whether the table shows the spread over seeds.
FIGURES = {
    column: told
    for name, (heading, form) in FORMS.items()
    for column, told in (
        (name, (heading, form, True)),
        (f"{name}{_LAST}", ("mean of\nlast 5", form, True)),
    )
} | {
    "payload_mb_up": ("MB up", ".1f", False),
    "payload_mb_down": ("MB down", ".1f", False),
    "seconds": ("seconds", ".0f", False),
}


def sweep(
    path: Path,
    out: Path | None = None,
    keep_states: bool = False,
    changes: Mapping[str, Value] = MappingProxyType({}),
) -> list[str]:
    """Execute all runs of a study that are not finished.

    Parameters
    ----------
    path : Path
        The study file; `slora_flwr.studies.study` describes the format.
    out : Path or None
        Folder for run directories, `runs.csv` and `tuning.csv`; None for
        `results/<stem of the file>` beside the file.
    keep_states : bool
        Keep the checkpoints and exported models of finished runs.
    changes : Mapping[str, Value]
        Run config keys that override those of the study's base and grids.

    Returns
    -------
    list[str]
        Names of the runs and trials that failed.

    Raises
    ------
    ConfigError
        If the file does not describe a study; nothing is run then.
    KeyboardInterrupt
        After Ctrl-C. Its message says what is left.
    """
    study = read_study(path, changes)
    folder = (out or path.parent / "results" / path.stem).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keys = varying(study.runs) or ["method"]
    scores: dict[Trial, dict[float, Score]] = {}
    roster: set[str] = set()

    def finish(runs: Collection[StudyRun]) -> None:
        roster.update(run.name for run in runs)
        write_roster(folder, path.stem, roster)
        runner.finish(runs)

    def choose(trials: list[Trial]) -> dict[Trial, float]:
        runs = {
            trial: {
                rate: _make_run(folder, trial.config(rate), trial.named, "tune")
                for rate in trial.rates
            }
            for trial in trials
        }
        finish([run for by_rate in runs.values() for run in by_rate.values()])
        for trial, by_rate in runs.items():
            scores[trial] = {
                rate: Score.of(run.evaluations(), _task_of(run.config))
                for rate, run in by_rate.items()
                if run.finished
            }
            if not scores[trial]:
                name = f"{trial.label} {trial.key}"
                runner.fail(name, "no tuning run completed")
        if scores:
            write_rows(folder / "tuning.csv", list(_tuning_rows(scores)))
        return {trial: best_rate(s) for trial, s in scores.items() if s}

    # A second sweep would take running runs for interrupted ones.
    refusal = (
        f"--out is {folder}, where another sweep is under way; allowed: another "
        "folder, or to wait"
    )
    with (
        sole_use(folder, refusal),
        _app(study, path) as app,
        Runner(study, app, keep_states) as runner,
    ):
        configs = {digest_of(config): config for config in tune(study, choose)}
        runs = [_make_run(folder, config, keys) for config in configs.values()]
        finish(runs)
    say = partial(runner.console.print, highlight=False, markup=False, soft_wrap=True)
    for line in _describe_tuning(scores):
        say(line)
    finished = [run for run in runs if run.finished]
    if finished:
        varied = varying(configs.values())
        rows = [_row(run, varied) for run in finished]
        write_rows(folder / "runs.csv", rows)
        shown = [key for key in varied if key in keys and key != "seed"]
        print_table(runner.console, _table(rows, shown), len(shown))
        if warned := [run.name for run in finished if "warning" in run.summary()]:
            say(tell_warned(warned, len(finished)))
        say(folder / "runs.csv")
    return runner.failed


def _app(study: Study, path: Path) -> AbstractContextManager[Path | None]:
    """Return the app of a study's runs, that around its file; None without Flower."""
    if study.engine != "flwr":
        return nullcontext()
    return app_folder(next(filter(is_app, path.absolute().parents), None))


def _make_run(
    folder: Path, config: Config, named: Iterable[str], purpose: str = ""
) -> StudyRun:
    digest, full = digest_of(config), flatten(parse(config))
    parts = [purpose] if purpose else []
    for key in named:
        if key in config:
            value = re.sub(r"[^\w.]+", "-", f"{config[key]}").strip("-")[-40:]
            text = isinstance(config[key], str)
            parts.append(value if text else f"{_last(key)}{value}")
    found = [path for path in folder.glob(f"*-{digest}") if path.is_dir()]
    # A run is identified by its digest, even if the study has changed since.
    path = found[0] if found else folder / "-".join([*parts, digest])
    return StudyRun(full | {"run.dir": str(path)}, path)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _tuning_rows(scores: dict[Trial, dict[float, Score]]) -> Iterator[dict[str, Any]]:
    for trial, by_rate in scores.items():
        goal = _task_of(trial.config(trial.rates[0])).goal
        names = dict.fromkeys((goal, "loss"))
        for rate in trial.rates:
            score = by_rate.get(rate)
            yield {
                **dict(zip(trial.per, trial.values, strict=True)),
                "key": trial.key,
                "rate": rate,
                **{name: score and score.figures[name] for name in names},
                "chosen": int(score is not None and rate == best_rate(by_rate)),
            }


def _describe_tuning(scores: dict[Trial, dict[float, Score]]) -> Iterator[str]:
    for trial, by_rate in scores.items():
        if by_rate:
            best = best_rate(by_rate)
            where = ", an end of the grid" if best in trial.ends else ""
            yield f"{trial.label}: {trial.key} {best:g}{where}"


def _task_of(config: Config) -> "Task":
    # Imported here, since a worker's torch must see its number of threads first.
    from slora_flwr.tasks.choice import find_task

    return find_task(parse(config))


def _row(run: StudyRun, keys: list[str]) -> dict[str, Any]:
    summary = run.summary()
    head = first_of(summary)
    last = [found[head] for found in run.evaluations() if head in found][-5:]
    figures = {name: summary[name] for name in FORMS if name in summary}
    figures[f"{head}{_LAST}"] = fmean(last) if last else None
    return {
        **{key: run.config[key] for key in keys},
        **{name: figures[name] for name in FIGURES if name in figures},
        "payload_mb_up": summary["payload_bytes_up"] / 1e6,
        "payload_mb_down": summary["payload_bytes_down"] / 1e6,
        "seconds": summary["seconds"],
        "run": run.name,
        "warning": summary.get("warning", ""),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, none of whose cells is a formula."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {name: csv_cell(value) for name, value in row.items()} for row in rows
        )


def _table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    """Return a table of means and standard deviations over seeds."""
    table = Table()
    for key in keys:
        table.add_column(_last(key))
    shown = {
        name: told for name, told in FIGURES.items() if any(name in r for r in rows)
    }
    for heading in ("runs", *(heading for heading, _, _ in shown.values())):
        table.add_column(heading, justify="right")
    groups: dict[tuple[Value, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        figures = [
            _mean([row.get(name) for row in group], form, spread)
            for name, (_, form, spread) in shown.items()
        ]
        cells = [escape(str(value)) for value in values]
        table.add_row(*cells, str(len(group)), *figures)
    return table


def _mean(values: list[float | None], form: str, spread: bool) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean = format(fmean(found), form)
    if not spread or len(found) == 1:
        return mean
    return f"{mean} ± {format(stdev(found), form)}"
