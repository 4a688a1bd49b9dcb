"""`slora sweep`: all runs of a study, and the tables of their results."""

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

from rich.markup import escape
from rich.table import Table

from slora_flwr.common.text import csv_cell
from slora_flwr.config import ConfigError, Value, flatten, parse
from slora_flwr.reports.chance import tell_warned
from slora_flwr.reports.narrow_tables import print_table
from slora_flwr.runs.lock import sole_use
from slora_flwr.runs.roster import write_roster
from slora_flwr.studies.runner import Runner, StudyRun
from slora_flwr.studies.study import (
    Config,
    Score,
    Trial,
    best_rate,
    digest_of,
    read_study,
    tune,
    varying,
)

# Columns of `runs.csv`, each with its heading and format in the printed table, and
# whether the table shows the spread over seeds.
FIGURES = {
    "accuracy": ("accuracy", ".1%", True),
    "accuracy_last_5": ("mean of\nlast 5", ".1%", True),
    "macro_f1": ("macro-F1", ".3f", True),
    "loss": ("loss", ".3f", True),
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
    app = _app_folder(path) if study.engine == "flwr" else None
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
                rate: Score.of(run.evaluations())
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
    with sole_use(folder, refusal), Runner(study, app, keep_states) as runner:
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


def _app_folder(path: Path) -> Path:
    for folder in path.absolute().parents:
        if (folder / "pyproject.toml").is_file():
            return folder
    raise ConfigError(
        f"sweep.engine is 'flwr', and {path.absolute()} is in no checkout; allowed: a "
        "study file in a checkout of slora-flwr, or engine inline"
    )


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
        for rate in trial.rates:
            score = by_rate.get(rate)
            yield {
                **dict(zip(trial.per, trial.values, strict=True)),
                "key": trial.key,
                "rate": rate,
                "accuracy": score and score.accuracy,
                "loss": score and score.loss,
                "chosen": int(score is not None and rate == best_rate(by_rate)),
            }


def _describe_tuning(scores: dict[Trial, dict[float, Score]]) -> Iterator[str]:
    for trial, by_rate in scores.items():
        if by_rate:
            best = best_rate(by_rate)
            where = ", an end of the grid" if best in trial.ends else ""
            yield f"{trial.label}: {trial.key} {best:g}{where}"


def _row(run: StudyRun, keys: list[str]) -> dict[str, Any]:
    summary = run.summary()
    last = [metrics["accuracy"] for metrics in run.evaluations()][-5:]
    return {
        **{key: run.config[key] for key in keys},
        "accuracy": summary["accuracy"],
        "accuracy_last_5": fmean(last) if last else None,
        "macro_f1": summary["macro_f1"],
        "loss": summary["loss"],
        "payload_mb_up": summary["payload_bytes_up"] / 1e6,
        "payload_mb_down": summary["payload_bytes_down"] / 1e6,
        "seconds": summary["seconds"],
        "run": run.name,
        "warning": summary.get("warning", ""),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys as CSV, none of whose cells is a formula."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {name: csv_cell(value) for name, value in row.items()} for row in rows
        )


def _table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    """Return a table of means and standard deviations over seeds."""
    table = Table()
    for key in keys:
        table.add_column(_last(key))
    for heading in ("runs", *(heading for heading, _, _ in FIGURES.values())):
        table.add_column(heading, justify="right")
    groups: dict[tuple[Value, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        figures = [
            _mean([row[name] for row in group], form, spread)
            for name, (_, form, spread) in FIGURES.items()
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
