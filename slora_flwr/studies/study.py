"""Study files: the runs that a TOML file describes, and how learning rates are tuned.

The sections of a study file, all optional:

`[sweep]`
    `engine`: `inline` or `flwr`. `processes`: number of runs at once (0: one per GPU
    or, without GPUs, per core).
`[base]`
    Run config keys for every run.
`[grid]`
    Run config keys with one value or a list of values; every combination is a run.
`[[also]]`
    A further grid, not crossed with the others; may be repeated.
`[tune]`
    `lr`: the rates to try. `validation`: the share of the training data on which they
    are compared. `rounds`: the length of a tuning run. `per`: the keys whose values are
    tuned separately, by default the method. `[tune.config]`: further keys for tuning
    runs. Any other key of the grids has the base's value in tuning runs.
"""

import itertools
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slora_flwr.config import ConfigError, RunConfig, Value, flatten, parse, refuse
from slora_flwr.config.arguments import flatten_tables
from slora_flwr.config.methods import (
    ADAPTERS,
    METHODS,
    PhaseRow,
    find_adapter,
    list_methods,
)
from slora_flwr.config.schedule import make_schedule

if TYPE_CHECKING:
    # A worker's torch must see its number of threads before it is imported.
    from slora_flwr.tasks.base import Task

Config = dict[str, Value]

DEFAULTS = flatten(RunConfig())
ENGINES = ("inline", "flwr")
# Keys that change nothing of what a run computes.
_ASIDE = ("run.dir", "run.metrics-port", "track")
SECTIONS = ("sweep", "base", "grid", "also", "tune")


@dataclass(frozen=True)
class Tuning:
    """How learning rates are tuned.

    Attributes
    ----------
    rates : tuple[float, ...]
        The rates to try, ascending; the same for every method and phase.
    config : dict[str, Value]
        Keys that tuning runs change in the base: a share of the training data that
        replaces the test data, and often fewer rounds.
    per : tuple[str, ...]
        Keys of the grid whose values are tuned separately.
    """

    rates: tuple[float, ...]
    config: Config
    per: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study file, with its grids expanded into run configs."""

    engine: str
    processes: int
    base: Config
    runs: tuple[Config, ...]
    tuning: Tuning | None


@dataclass(frozen=True)
class Trial:
    """A learning rate to tune: its key, and the config that its tuning runs share.

    `values` are the values of the keys in `per`.
    """

    key: str
    rates: tuple[float, ...]
    per: tuple[str, ...]
    values: tuple[Value, ...]
    shared: tuple[tuple[str, Value], ...]

    @property
    def label(self) -> str:
        """The values of `per`, for messages."""
        return " ".join(map(str, self.values)) or "all methods"

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and highest rate."""
        return self.rates[0], self.rates[-1]

    @property
    def named(self) -> list[str]:
        """The keys that distinguish its runs from those of other trials."""
        return list(dict.fromkeys(["method", *self.per, self.key]))

    def config(self, rate: float) -> Config:
        """Return the config of the run that tries a rate."""
        return {**dict(self.shared), self.key: rate}


@dataclass(frozen=True)
class Score:
    """The result of a tuning run.

    Attributes
    ----------
    merit : float
        The task's score of `figures`.
    figures : dict[str, float]
        The task's goal and the loss: means over the last evaluations.
    """

    merit: float
    figures: dict[str, float]

    @classmethod
    def of(cls, evaluations: list[dict[str, float]], task: "Task") -> "Score":
        """Return the score of the last three evaluations."""
        last = evaluations[-3:]
        # A figure that is not finite is not recorded.
        figures = {
            name: fmean(found.get(name, math.inf) for found in last)
            for name in (task.goal, "loss")
        }
        score = task.score(figures)
        return cls(-math.inf if score is None else score, figures)


def read_study(
    path: Path, changes: Mapping[str, Value] = MappingProxyType({})
) -> Study:
    """Read a study file and check all of its runs.

    Parameters
    ----------
    path : Path
        The file.
    changes : Mapping[str, Value]
        Run config keys that override those of its base and its grids.

    Raises
    ------
    ConfigError
        If a section or a run is invalid; the message names it and the file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        study = _study(content, changes)
        for _ in planned(study):
            pass
    except OSError as error:
        raise ConfigError(f"study file: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _study(content: dict[str, Any], changes: Mapping[str, Value]) -> Study:
    _known("section", content, SECTIONS)
    for name, section in content.items():
        tables = section if name == "also" else [section]
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise refuse(name, section, "[[also]]" if name == "also" else f"[{name}]")
    sweep = content.get("sweep", {})
    _known("key of [sweep]", sweep, ("engine", "processes"))
    engine, processes = sweep.get("engine", "inline"), sweep.get("processes", 0)
    if engine not in ENGINES:
        raise refuse("sweep.engine", engine, ", ".join(ENGINES))
    if type(processes) is not int or processes < 0:
        raise refuse("sweep.processes", processes, "a whole number from 0")
    if engine == "flwr" and processes > 1:
        raise refuse("sweep.processes", processes, "0 or 1 for engine flwr")
    base = flatten_tables(content.get("base", {})) | {**changes}
    grids = content.get("also", [])
    if "grid" in content or not grids:
        grids = [content.get("grid", {}), *grids]
    runs = []
    for combination in itertools.chain.from_iterable(map(_expand, grids)):
        runs.append(base | combination | {**changes})
        _check(runs[-1], combination)
    tuning = _tuning(content["tune"]) if "tune" in content else None
    return Study(engine, processes, base, tuple(runs), tuning)


def _tuning(section: dict[str, Any]) -> Tuning:
    allowed = ("lr", "validation", "rounds", "per", "config")
    _known("key of [tune]", section, allowed)
    rates = section.get("lr")
    if not isinstance(rates, list) or not rates or not all(map(_is_rate, rates)):
        raise refuse("tune.lr", rates, "a list of numbers above 0")
    config = flatten_tables(section.get("config", {}))
    validation = section.get("validation", 0.1)
    # Rates must not be chosen on the test data.
    if not _is_rate(validation) or validation >= 1:
        raise refuse("tune.validation", validation, "a number above 0 below 1")
    config["data.validation"] = validation
    if "rounds" in section:
        config["rounds"] = section["rounds"]
    per = section.get("per", ["method"])
    if not isinstance(per, list) or not all(key in [*DEFAULTS] for key in per):
        raise refuse("tune.per", per, "a list of run config keys")
    return Tuning(tuple(sorted({float(r) for r in rates})), config, tuple(per))


def _is_rate(given: object) -> bool:
    return type(given) in (int, float) and 0 < given < math.inf  # type: ignore[operator]


def _known(what: str, given: Iterable[str], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{name} is no {what}; allowed: {', '.join(allowed)}")


def _expand(grid: Mapping[str, Any]) -> Iterator[Config]:
    """Yield every combination of a grid's values."""
    flat = flatten_tables(grid)
    for key, values in flat.items():
        if values == []:
            raise refuse(key, values, "a value, or a list of at least one")
    lists = [v if isinstance(v, list) else [v] for v in flat.values()]
    for values in itertools.product(*lists):
        yield dict(zip(flat, values, strict=True))


def _check(config: Config, combination: Config, kind: str = "run") -> None:
    for key in {"run.dir", "run.resume"} & config.keys():
        raise refuse(key, config[key], "none, since a sweep sets where runs go")
    try:
        parse(config)
    except ConfigError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in combination.items())
        raise ConfigError(f"{error} (in the {kind} {given or 'of [base]'})") from error


def digest_of(config: Config) -> str:
    """Return 8 hex digits that identify a run config, however its values are written.

    Keys at their default are not included, so adding a key to the package does not
    change the digests of finished runs.
    """
    full = flatten(parse(config))
    given = {key: full[key] for key in sorted(full) if full[key] != DEFAULTS[key]}
    for key in _ASIDE:
        given.pop(key, None)
    return blake2b(json.dumps(given).encode(), digest_size=4).hexdigest()


def varying(configs: Iterable[Config]) -> list[str]:
    """Return the keys in which configs differ, the method first and the seed last."""
    full = [flatten(parse(config)) for config in configs]
    keys = [key for key in DEFAULTS if len({config[key] for config in full}) > 1]
    return sorted(keys, key=lambda key: (key != "method", key == "seed", key))


def adapters_of(config: Config) -> list[str]:
    """Return the adapters of a run's phases."""
    return [phase.adapter for phase in make_schedule(parse(config))]


def tune(
    study: Study, choose: Callable[[list[Trial]], dict[Trial, float]]
) -> list[Config]:
    """Return a study's runs with tuned learning rates, found phase by phase.

    Parameters
    ----------
    study : Study
        The study. Rates that its runs set are not tuned.
    choose : Callable[[list[Trial]], dict[Trial, float]]
        Returns the best rates. A run is omitted if one of its rates is missing.
    """
    runs = [(run, Config()) for run in study.runs]
    if study.tuning is None:
        return [run for run, _ in runs]
    for i in range(max(len(adapters_of(run)) for run in study.runs)):
        trials = [_trial(study.base, study.tuning, i, *run) for run in runs]
        rates = choose(list({trial: None for trial in trials if trial}))
        for trial, (_, tuned) in zip(trials, runs, strict=True):
            if trial in rates:
                tuned[trial.key] = rates[trial]
        runs = [
            run
            for run, trial in zip(runs, trials, strict=True)
            if trial is None or trial in rates
        ]
    return [run | tuned for run, tuned in runs]


def _trial(
    base: Config, tuning: Tuning, i: int, run: Config, tuned: Config
) -> Trial | None:
    """Return the trial of a run's phase i; None if its rate is set or it has none."""
    adapters = adapters_of(run)
    if i >= len(adapters):
        return None
    adapter = find_adapter(adapters[i])
    key = f"{adapter.section or 'train'}.lr"
    if key in run or key in tuned or (adapter.is_head and run.get("train.head-lr")):
        return None
    # The best rate depends on the head's, where a grid sets that.
    heads = [k for k in run if k.endswith(".head-lr") and k not in base]
    per = tuple(dict.fromkeys([*tuning.per, *heads]))
    full = flatten(parse(run))
    values = {name: full[name] for name in per}
    config = base | tuning.config | {"method": full["method"]} | values | tuned
    if i < len(adapters) - 1 and (alone := _method_of(adapters[i])):
        # A run of this phase alone does not need the next phase's rate, not tuned yet.
        config["method"] = alone
    shared = tuple(sorted(config.items()))
    return Trial(key, tuning.rates, per, tuple(values.values()), shared)


def _method_of(adapter: str) -> str | None:
    """Return the method whose only phase trains an adapter; None if there is none."""
    row = PhaseRow(adapter)
    # Methods from outside are not loaded to look for an adapter of this package.
    known = METHODS if adapter in ADAPTERS else list_methods()
    return next((n for n, m in known.items() if m.phases == (row,)), None)


def planned(study: Study) -> Iterator[Config]:
    """Return the checked config of each run, including tuning runs.

    Raises
    ------
    ConfigError
        If a tuning run is invalid.
    """
    found: dict[str, Config] = {}

    def stand_in(trials: list[Trial]) -> dict[Trial, float]:
        for trial in trials:
            for rate in trial.rates:
                config = trial.config(rate)
                combination = {key: config[key] for key in trial.named}
                _check(config, combination, "tuning run")
                found[digest_of(config)] = config
        return {trial: trial.rates[0] for trial in trials}

    for run in tune(study, stand_in):
        found[digest_of(run)] = run
    return iter(found.values())


def best_rate(scores: Mapping[float, Score]) -> float:
    """Return the rate with the highest merit; among equals, the lowest loss.

    A run whose loss is not finite ranks below all others.
    """

    def merit(rate: float) -> tuple[bool, float, float, float]:
        score = scores[rate]
        loss = score.figures["loss"]
        finite = math.isfinite(loss)
        return finite, score.merit, -loss if finite else 0.0, -rate

    return max(scores, key=merit)
