"""Groups of runs that differ only in the seed, and the figures of a group."""

from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count, product
from math import ceil
from statistics import fmean
from string import ascii_uppercase
from types import MappingProxyType

from slora_flwr.common.text import shorten
from slora_flwr.config import (
    PARTITIONERS,
    PhaseRecipeConfig,
    RunConfig,
    Value,
    flatten,
    refuse,
)
from slora_flwr.config.methods import (
    REFERENCES,
    acts_on_targets,
    list_methods,
    section_of,
)
from slora_flwr.reports.figures import ACCURACY, Headline
from slora_flwr.runs.reader import RecordedRun

LONGEST = 48  # characters of a group's label; a letter replaces longer ones

# Sections that do not matter to methods without a phase that reads them.
_PHASES = {n for n, s in vars(RunConfig()).items() if isinstance(s, PhaseRecipeConfig)}
# How tensors are encoded, which any method can choose.
_CODING = ("upload", "download")
_DEFAULTS = flatten(RunConfig())
# What happens between phases, where a method has several.
_BETWEEN_PHASES = ("sparse.rounds", "server.handoff")
# Keys that matter only to these partitioners.
_PARTITIONERS = {
    "clients.alpha": ("dirichlet", "virtual"),
    "clients.classes": ("pathological",),
    "clients.examples": ("virtual",),
}
HETEROGENEITY = ("clients.partitioner", *_PARTITIONERS)


@dataclass(frozen=True)
class Group:
    """Runs of one config, with any seed.

    Attributes
    ----------
    label : str
        A given name; or the method with the keys that distinguish the group; or the
        method with a letter, if those are long or distinguish it only when exact.
    differences : dict[str, Value]
        The method, the heterogeneity if groups differ in it, and the keys that
        distinguish the group.
    config : dict[str, Value]
        The keys that matter to the method, without seed and `run.*`.
    runs : list[RecordedRun]
        The runs whose figures count: those that completed or, if none did, all.
    others : list[RecordedRun]
        The runs that did not complete, if others did.
    """

    label: str
    differences: dict[str, Value]
    config: dict[str, Value]
    runs: list[RecordedRun]
    others: list[RecordedRun]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def is_told(self) -> bool:
        """Whether the label tells the differences."""
        return self.label == _label(self.differences) + self._suffix

    @property
    def _suffix(self) -> str:
        return "" if self.ended else " (stopped)"

    def named(self, name: str) -> "Group":
        """Return the group with another label."""
        return replace(self, label=name + self._suffix)

    def answers_to(self, given: str) -> bool:
        """Return whether a text is its label, or one of its runs' name or path."""
        runs = self.runs + self.others
        texts = {text for run in runs for text in (run.path.name, str(run.path))}
        return given in {self.label.removesuffix(self._suffix), *texts}

    @property
    def is_reference(self) -> bool:
        """Whether this is full fine-tuning, the reference for all others."""
        return self.config["method"] == REFERENCES[0]

    @property
    def ended(self) -> bool:
        """Whether its runs completed."""
        return self.runs[0].summary is not None

    @property
    def setting(self) -> Hashable:
        """The values that groups must share to be compared as methods."""
        return _frozen({k: v for k, v in self.config.items() if not _is_own(k)})

    @property
    def elsewhere(self) -> Hashable:
        """The setting without its heterogeneity."""
        return _frozen(
            {
                key: value
                for key, value in self.config.items()
                if not (_is_own(key) or key in HETEROGENEITY)
            }
        )

    @property
    def heterogeneity(self) -> str:
        """How unevenly the data is partitioned: `iid`, `alpha=0.1`, …."""
        return heterogeneity(self.config)


@dataclass(frozen=True)
class Point:
    """An evaluation that all runs of a group have.

    Attributes
    ----------
    round : int
        The round after which the runs were evaluated.
    phase : str
        The phase of that round.
    accuracies : list[float]
        The accuracy of each run, or its perplexity.
    megabytes : float
        Payload so far in both directions, mean over runs.
    seconds : list[float]
        Modelled seconds so far at each rate, mean over runs.
    """

    round: int
    phase: str
    accuracies: list[float]
    megabytes: float
    seconds: list[float]

    @property
    def accuracy(self) -> float:
        """Mean over runs."""
        return fmean(self.accuracies)


def group_runs(
    runs: Iterable[RecordedRun], names: Mapping[str, str] = MappingProxyType({})
) -> list[Group]:
    """Return groups of runs whose configs differ only in the seed, or not at all.

    Keys that the method or the partitioner does not read are ignored.

    Parameters
    ----------
    runs : Iterable[RecordedRun]
        The runs.
    names : Mapping[str, str]
        Labels by the labels that groups have without them, or by the name or path of
        one of the group's runs.

    Raises
    ------
    ConfigError
        If a name is of no group, too long, or another group's.
    """
    together: dict[Hashable, list[RecordedRun]] = {}
    for run in runs:
        together.setdefault(_frozen(_effective(run.config)), []).append(run)
    groups = []
    configs = [_effective(members[0].config) for members in together.values()]
    for config, members in zip(configs, together.values(), strict=True):
        members.sort(key=lambda run: (run.config["seed"], str(run.path)))
        ended = [run for run in members if run.summary is not None]
        counted = ended or members
        told = _differences(config, configs, heterogeneity)
        others = [run for run in members if run not in counted]
        group = Group("", told, config, counted, others)
        groups.append(group.named(_label(told)))
    return _rename(_shortened(sorted(groups, key=_order)), names)


def _shortened(groups: list[Group]) -> list[Group]:
    """Return groups with letters in place of labels that are long or not unique."""
    labels = [_label(group.differences) for group in groups]
    times, letters = Counter(labels), _letters()
    return [
        group
        if len(label) <= LONGEST and times[label] == 1
        else group.named(_lettered(group.method, next(letters)))
        for group, label in zip(groups, labels, strict=True)
    ]


def _letters() -> Iterator[str]:
    """Yield A, B, …, Z, AA, AB, …."""
    for length in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=length))


def _lettered(method: str, letter: str) -> str:
    label = f"{method} {letter}"
    return label if len(label) <= LONGEST else letter


def _rename(groups: list[Group], names: Mapping[str, str]) -> list[Group]:
    renamed = list(groups)
    for given, name in names.items():
        if not 0 < len(name.strip()) <= LONGEST:
            allowed = f"GROUP=NAME with a NAME of 1 to {LONGEST} characters"
            raise refuse("--name", f"{given}={name}", allowed)
        places = [i for i, group in enumerate(groups) if group.answers_to(given)]
        if not places:
            labels = ", ".join(map(str, shorten([group.label for group in groups])))
            allowed = f"GROUP=NAME, where GROUP is one of {labels}, or one of its runs"
            raise refuse("--name", f"{given}={name}", allowed)
        for place in places:
            renamed[place] = groups[place].named(name.strip())
    for label, times in Counter(group.label for group in renamed).items():
        if times > 1:
            raise refuse("--name", label, "another NAME for each group")
    return renamed


def curve(
    group: Group, rates: Sequence[float], head: Headline = ACCURACY
) -> list[Point]:
    """Return a group's mean curve, with modelled seconds at each rate in Mbit/s."""
    common = sorted(
        set.intersection(
            *(
                {r.round for r in run.evaluated if head.metric in r.metrics}
                for run in group.runs
            )
        )
    )
    done = [{r.round: r for r in run.rounds} for run in group.runs]
    seconds = [
        [
            dict(zip(rounds, modelled_seconds(run, rate), strict=True))
            for run, rounds in zip(group.runs, done, strict=True)
        ]
        for rate in rates
    ]
    return [
        Point(
            round=number,
            phase=done[0][number].phase,
            accuracies=[rounds[number].metrics[head.metric] for rounds in done],
            megabytes=fmean(rounds[number].payload_bytes / 1e6 for rounds in done),
            seconds=[fmean(by_round[number] for by_round in at) for at in seconds],
        )
        for number in common
    ]


def modelled_seconds(run: RecordedRun, rate: float) -> list[float]:
    """Model when each round would end if each client were a separate machine.

    The duration of a round is the training time of its slowest client plus the time to
    receive and send a payload of mean size at `rate`. Transfers of a failed attempt
    count too.

    Parameters
    ----------
    run : RecordedRun
        The run, with bytes and seconds of each round.
    rate : float
        Rate in Mbit/s.

    Returns
    -------
    list of float
        Seconds from the start to the end of each of the run's rounds.
    """
    sizes: dict[int, float] = {}
    for line in run.ledger:
        if line.clients:
            mean = line.payload_bytes / line.clients
            sizes[line.round] = sizes.get(line.round, 0.0) + mean
    return list(
        accumulate(
            sizes.get(done.round, 0.0) * 8 / (rate * 1e6)
            + max((did.seconds for did in done.clients.values()), default=0.0)
            for done in run.rounds
        )
    )


def final(run: RecordedRun, metric: str) -> float | None:
    """Return a metric of a run's last evaluation."""
    return run.evaluated[-1].metrics.get(metric) if run.evaluated else None


def last_mean(run: RecordedRun, head: Headline = ACCURACY) -> float | None:
    """Return the mean of a metric in a run's last evaluations."""
    metric = head.metric
    last = [r.metrics[metric] for r in run.evaluated if metric in r.metrics][
        -head.last :
    ]
    return fmean(last) if last else None


def over_runs(
    group: Group, figure: Callable[[RecordedRun], float | None]
) -> list[float]:
    """Return a figure of each run that has it."""
    return [value for run in group.runs if (value := figure(run)) is not None]


def families(groups: Iterable[Group], head: Headline) -> Iterator[list[Group]]:
    """Yield the groups that ended and differ in method and heterogeneity alone."""
    found: dict[Hashable, list[Group]] = {}
    for group in groups:
        if group.ended and over_runs(group, partial(last_mean, head=head)):
            found.setdefault(group.elsewhere, []).append(group)
    yield from found.values()


def fft_beside(
    group: Group, groups: Iterable[Group], head: Headline = ACCURACY
) -> Group | None:
    """Return full fine-tuning's best group in a group's setting, if there is one."""

    def level(group: Group) -> list[float]:
        return over_runs(group, partial(last_mean, head=head))

    found = [
        other
        for other in groups
        if other.is_reference
        and other.ended
        and other.setting == group.setting
        and level(other)
    ]
    best: Group | None = head.better(
        found, key=lambda other: fmean(level(other)), default=None
    )
    return best


def reached(
    points: Iterable[Point], target: float, head: Headline = ACCURACY
) -> Point | None:
    """Return the first point of a mean curve that reaches a target."""
    return next((p for p in points if head.reaches(p.accuracy, target)), None)


def late_losses(group: Group) -> list[float]:
    """Return each client's mean training loss in the last fifth of a run's rounds."""
    losses: list[float] = []
    for run in group.runs:
        late: dict[int, list[float]] = {}
        for done in run.rounds[-ceil(len(run.rounds) / 5) :]:
            for client, did in done.clients.items():
                late.setdefault(client, []).append(did.loss)
        losses += map(fmean, late.values())
    return losses


def heterogeneity(config: dict[str, Value]) -> str:
    """Return a short name of how a config partitions its data."""
    partitioner = str(config["clients.partitioner"])
    told = [
        f"{_short(key)}={_value(config[key])}"
        for key, known in _PARTITIONERS.items()
        if partitioner in known
    ]
    name = [] if partitioner == "dirichlet" else [partitioner]
    return " ".join(name + told)


def _effective(config: dict[str, Value]) -> dict[str, Value]:
    method = list_methods().get(str(config["method"]))
    rows = method.phases if method else ()
    sections = {section_of(row.adapter) for row in rows}
    partitioner = config["clients.partitioner"]

    def matters(key: str) -> bool:
        section = key.split(".")[0]
        if key == "seed" or section == "run":
            return False
        if key == "lora.targets":
            return any(acts_on_targets(row.adapter) for row in rows)
        if key in _BETWEEN_PHASES:
            return len(rows) != 1
        if section in _PHASES and rows and section not in sections:
            return False
        return partitioner in _PARTITIONERS.get(key, (partitioner,))

    return {key: value for key, value in config.items() if matters(key)}


def _is_own(key: str) -> bool:
    """Return whether a key is specific to a method, such as its learning rate."""
    section = key.split(".")[0]
    if section == "train":
        return _is_rate(key)
    return key in ("method", *_BETWEEN_PHASES) or section in (*_PHASES, *_CODING)


def _is_rate(key: str) -> bool:
    """Return whether a key is a learning rate of clients."""
    section, _, name = key.partition(".")
    return section in ("train", *_PHASES) and name in ("lr", "head-lr")


def _differences(
    config: dict[str, Value],
    configs: Collection[dict[str, Value]],
    *tellers: Callable[[dict[str, Value]], str],
) -> dict[str, Value]:
    """Return the method, what `tellers` say if it differs, and the keys that differ."""
    same = [other for other in configs if other["method"] == config["method"]]
    told = {"method": config["method"]}
    for tell in tellers:
        if len({*map(tell, configs)}) > 1:
            told[tell.__name__] = tell(config)
    for key in config:
        beside = same if _is_own(key) else configs
        values = {other[key] for other in beside if key in other}
        # The default encoding, plain float32, is not worth a mention.
        plain = key.split(".")[0] in _CODING and config[key] == _DEFAULTS[key]
        if len(values) > 1 and not plain and key not in ("method", *HETEROGENEITY):
            told[key] = config[key]
    return told


def _label(differences: dict[str, Value]) -> str:
    """Return differences as a short text, the method first."""
    alone = ("method", heterogeneity.__name__)
    return " ".join(
        str(value) if key in alone else f"{_short(key)}={_value(value)}"
        for key, value in differences.items()
    )


def _short(key: str) -> str:
    section, _, last = key.rpartition(".")
    named = [known for known in flatten(RunConfig()) if known.split(".")[-1] == last]
    return last if section == "clients" or len(named) == 1 else key


def _value(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(group: Group) -> tuple[object, ...]:
    methods = {name: i for i, name in enumerate(list_methods())}
    return evenness(group.config), methods.get(group.method, len(methods)), group.label


def evenness(config: dict[str, Value]) -> tuple[int, float]:
    """Return a key that sorts configs from even to uneven partitions."""
    partitioner = str(config["clients.partitioner"])
    spread = config.get("clients.alpha", config.get("clients.classes", 0))
    # A later version may have others.
    known = [*PARTITIONERS, partitioner]
    return known.index(partitioner), -float(spread)


def _frozen(config: dict[str, Value]) -> Hashable:
    return frozenset(config.items())


def rows_of_methods(family: Sequence[Group]) -> dict[str, list[Group]]:
    """Return groups that differ in method and heterogeneity as rows, one per method.

    Each variant of a method has its own row. Learning rates may differ between
    heterogeneities, but two rates for one heterogeneity make two variants.
    """

    def sort(leave_out_rates: bool) -> dict[str, list[Group]]:
        own = [
            {
                key: value
                for key, value in group.config.items()
                if _is_own(key) and not (leave_out_rates and _is_rate(key))
            }
            for group in family
        ]
        rows: dict[str, list[Group]] = {}
        for group, config in zip(family, own, strict=True):
            rows.setdefault(_label(_differences(config, own)), []).append(group)
        return rows

    rows = sort(leave_out_rates=True)
    is_clear = all(
        len({group.heterogeneity for group in members}) == len(members)
        for members in rows.values()
    )
    return rows if is_clear else sort(leave_out_rates=False)
