"""The page on one run."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from slora_flwr.config import RunConfig, flatten
from slora_flwr.reports.charts import Chart, Line, bar_chart, keys, line_chart, looks
from slora_flwr.reports.class_tables import class_sections
from slora_flwr.reports.figures import FORMS, Headline, headline_of
from slora_flwr.reports.groups import heterogeneity, last_mean
from slora_flwr.reports.page import LISTED, Cell, Column, Page, Section, Table
from slora_flwr.runs.events import ClientRecord, RecordedRound
from slora_flwr.runs.reader import Failure, RecordedRun, by_layer


def report(run: RecordedRun) -> Page:
    """Return the page on a run: its config, metrics, bytes, clients and failures."""
    config = run.config
    count = config["clients.count"]
    clients = f"{count} clients" if count else "one client per node"
    sections = [_phases(run)]
    if run.evaluated:
        sections.append(_curves(run))
    sections += class_sections(run)
    if run.energies:
        sections.append(_handoff(run))
    if any(done.clients for done in run.rounds):
        sections.append(_clients(run))
    if run.failures:
        sections.append(_failures(run))
    return Page(
        title=f"{run.method} on {_name_of_data(run)}",
        subtitle=(
            f"{config['model.name']}; {clients}, {heterogeneity(config)}, "
            f"{config['clients.per-round']} a round; seed {config['seed']}; "
            f"run {run.path.name}"
        ),
        notice=_notice(run),
        figures=_figures(run),
        sections=[*sections, _config(run)],
    )


def _name_of_data(run: RecordedRun) -> str:
    """Return what the data is called, of a file or folder its name alone."""
    name = str(run.config["data.name"])
    return Path(name).name if Path(name).is_absolute() else name


def _notice(run: RecordedRun) -> str:
    if run.summary is not None:
        return f"{run.summary.warning} {run.damage}".strip()
    done = f"{len(run.rounds)} of {run.config['rounds']} rounds are done"
    if run.state == "running":
        return f"This run is going on: {done}. {run.damage}".strip()
    reason = f" It was stopped: {run.stopped}" if run.stopped else ""
    return f"This run is not complete: {done}.{reason} {run.damage}".strip()


def _figures(run: RecordedRun) -> list[tuple[str, str]]:
    figures = []
    head = headline_of(run.evaluated)
    best, steady = head.best(run.evaluated), last_mean(run, head)
    if best is not None and steady is not None:
        last = _last(run, head)
        figures += [
            (f"{head.name}, round {last.round}", f"{_value(last, head):{head.form}}"),
            (f"mean of the last {head.last} evaluations", f"{steady:{head.form}}"),
            (
                f"best {head.name}, round {best.round}",
                f"{_value(best, head):{head.form}}",
            ),
        ]
        for name, (told, form) in FORMS.items():
            is_told = name in (head.metric, "loss")
            if not is_told and (value := last.metrics.get(name)) is not None:
                figures.append((told, f"{value:{form}}"))
    majority = _majority(run)
    if majority is not None:
        figures.append(("majority class", f"{majority:.1%}"))
    if run.rounds and (epsilon := run.rounds[-1].epsilon) is not None:
        at = "" if run.delta is None else f", at delta {run.delta:.2g}"
        figures.append((f"epsilon{at}", f"{epsilon:.2f}"))
    return [
        *figures,
        ("rounds", str(len(run.rounds))),
        ("MB up", f"{(run.total('payload', 'up') or 0) / 1e6:.2f}"),
        ("MB down", f"{(run.total('payload', 'down') or 0) / 1e6:.2f}"),
        ("seconds", f"{_seconds(run):.0f}"),
        ("failures", str(len(run.failures))),
    ]


def _value(done: RecordedRound, head: Headline) -> float:
    return done.metrics[head.metric]


def _last(run: RecordedRun, head: Headline) -> RecordedRound:
    """Return the last round that has a metric; one has."""
    return next(r for r in reversed(run.evaluated) if head.metric in r.metrics)


def _majority(run: RecordedRun) -> float | None:
    in_rounds = [r.metrics.get("majority_accuracy") for r in run.evaluated]
    told = [run.summary.majority_accuracy if run.summary else None, *in_rounds]
    return next((value for value in told if value is not None), None)


def _seconds(run: RecordedRun) -> float:
    if run.summary is not None:
        return run.summary.seconds
    return run.rounds[-1].seconds if run.rounds else 0.0


def _megabytes(
    run: RecordedRun, unit: str, direction: str, phase: str | None = None
) -> float | None:
    size = run.total(unit, direction, phase)
    return None if size is None else size / 1e6


def _phases(run: RecordedRun) -> Section:
    head = headline_of(run.evaluated)
    name = f"{head.metric}{head.percent}"
    columns = [
        Column("", "phase"),
        Column("rounds", "rounds", "d"),
        Column(head.axis, name, head.spec),
        Column("MB up", "payload_megabytes_up", ".2f"),
        Column("MB down", "payload_megabytes_down", ".2f"),
    ]
    units = ["payload"]
    if run.total("planned_payload", "up") is not None:
        columns += [
            Column("planned MB up", "planned_megabytes_up", ".2f"),
            Column("planned MB down", "planned_megabytes_down", ".2f"),
        ]
        units.append("planned_payload")
    columns += [
        Column("message MB up", "message_megabytes_up", ".2f"),
        Column("message MB down", "message_megabytes_down", ".2f"),
        Column("seconds", "seconds", ".0f"),
    ]
    units.append("message")
    has_wire = any(line.wire_bytes is not None for line in run.ledger)
    if has_wire:
        columns[-1:-1] = [
            Column("wire MB up", "wire_megabytes_up", ".2f"),
            Column("wire MB down", "wire_megabytes_down", ".2f"),
        ]
        units.append("wire")

    def row(
        name: str, rounds: list[RecordedRound], phase: str | None, seconds: float
    ) -> None:
        values = [
            head.scale * _value(r, head) for r in rounds if head.metric in r.metrics
        ]
        sizes = [_megabytes(run, u, d, phase) for u in units for d in ("up", "down")]
        last = values[-1] if values else None
        rows.append([name, len(rounds), last, *sizes, seconds])

    rows: list[list[Cell]] = []
    before = 0.0
    told = run.summary.phases if run.summary else {}
    for phase, rounds in run.phases.items():
        seconds = rounds[-1].seconds - before
        before = rounds[-1].seconds
        if phase in told and (known := told[phase].seconds) is not None:
            seconds = known
        row(phase, rounds, phase, seconds)
    row(run.method, run.rounds, None, _seconds(run))
    for method, size in (run.summary.same_rounds if run.summary else {}).items():
        empty = [None] * (len(columns) - 5)
        name = f"{method}, same rounds"
        rows.append([name, len(run.rounds), None, size / 1e6, size / 1e6, *empty])
    caption = (
        "MB up and down: bytes of the tensors, counting each client as if it were a "
        "separate node. Message MB: what was sent, one message per node. "
        f"{head.name.capitalize()}: at the phase's last evaluation."
    )
    if has_wire:
        caption += " Wire MB: what nodes counted on their network interfaces."
    return Section("Phases", tables=[Table("phases", caption, columns, rows)])


def _boundaries(
    run: RecordedRun, at: Callable[[RecordedRound], float]
) -> list[tuple[float, str]]:
    """Return the x at which each phase but the first begins, with its name."""
    phases = list(run.phases.items())
    return [
        (at(before[-1]), f"{name} →") for (_, before), (name, _) in pairwise(phases)
    ]


def accuracy_charts(run: RecordedRun) -> list[Chart]:
    """Return charts of accuracy, or perplexity, against rounds, megabytes and seconds.

    At least one round of the run was evaluated.
    """
    head = headline_of(run.evaluated)
    metrics = _measured(run, head)
    found = looks(metrics.values(), metrics)
    majority = _majority(run)
    axes: dict[str, Callable[[RecordedRound], float]] = {
        "round": lambda done: done.round,
        "MB of tensors, both directions": lambda done: done.payload_bytes / 1e6,
        "seconds": lambda done: done.seconds,
    }

    def chart(x: str, at: Callable[[RecordedRound], float]) -> Chart:
        lines = []
        for metric, label in metrics.items():
            points = [done for done in run.evaluated if metric in done.metrics]
            y = [head.scale * done.metrics[metric] for done in points]
            lines.append(Line(label, found[label], [at(done) for done in points], y))
        last = f"{_value(_last(run, head), head):{head.form}}"
        dotted = "" if majority is None else " Dotted: always the majority class."
        caption = f"{head.name.capitalize()} against {x}; at the end {last}.{dotted}"
        return line_chart(
            caption,
            lines,
            x=x,
            y=head.axis,
            whole=x == "round",
            boundaries=_boundaries(run, at),
            level=None if majority is None else 100 * majority,
        )

    return [chart(x, at) for x, at in axes.items()]


def _curves(run: RecordedRun) -> Section:
    head = headline_of(run.evaluated)
    metrics = _measured(run, head)
    found = looks(metrics.values(), metrics)
    return Section(
        head.name.capitalize(),
        keys=keys(found) if len(metrics) > 1 else (),
        charts=accuracy_charts(run),
    )


def _measured(run: RecordedRun, head: Headline) -> dict[str, str]:
    """Return the names under which a metric is recorded, each with what it is of."""
    others = {
        f"client_{head.metric}": "the clients' held-out examples",
        f"plain_{head.metric}": "the last state, not averaged",
    }
    return {head.metric: "server's test data"} | {
        name: told
        for name, told in others.items()
        if any(name in done.metrics for done in run.evaluated)
    }


def _handoff(run: RecordedRun) -> Section:
    kinds = by_layer(run.energies)
    found = looks(kinds, kinds)
    shares = run.energies.values()
    worst = min(run.energies, key=run.energies.__getitem__)
    text = (
        f"Rank {run.config['lora.rank']} keeps {fmean(shares):.1%} of the squared norm "
        f"of what the sparse phase changed, as a mean over matrices, and at worst "
        f"{min(shares):.1%}, for {worst}. The low-rank phase's base is "
        f"{run.config['lora.base']}."
    )
    chart = line_chart(
        "Energy kept by the rank, per layer and kind of matrix.",
        [
            Line(kind, found[kind], list(layers), [100 * e for e in layers.values()])
            for kind, layers in kinds.items()
        ],
        x="layer",
        y="energy kept, %",
        whole=True,
    )
    return Section("Handoff", [text], keys(found), [chart], [energy_table(kinds)])


def energy_table(kinds: dict[str, dict[int, float]], name: str = "energies") -> Table:
    """Return a table of energies in percent, by kind of matrix and layer."""
    layers = sorted({layer for shares in kinds.values() for layer in shares})
    return Table(
        name,
        "Energy kept by kind of matrix and layer, %",
        [
            Column("matrix", "matrix"),
            Column("mean", "mean", ".1f"),
            *(Column(str(layer), f"layer_{layer}", ".1f") for layer in layers),
        ],
        [
            [
                kind,
                100 * fmean(shares.values()),
                *(100 * shares[at] if at in shares else None for at in layers),
            ]
            for kind, shares in kinds.items()
        ],
        folded=True,
    )


def _clients(run: RecordedRun) -> Section:
    did: dict[int, list[ClientRecord]] = {}
    for done in run.rounds:
        for client, trained in done.clients.items():
            did.setdefault(client, []).append(trained)
    weights = [parts[-1].examples for parts in did.values()]
    unit = str(run.config["clients.weight"])
    times = Counter(len(parts) for parts in did.values())
    count = int(run.config["clients.count"])
    taking_part = f"{len(did)} clients took part"
    if count:
        taking_part = f"{len(did)} of {count} clients took part"
        times[0] = count - len(did)
    most = max(times)
    least, largest = min(weights), max(weights)
    sizes, edges = np.histogram(weights, bins=min(20, largest - least + 1))
    text = (
        f"{taking_part}, up to {most} times each. They have {least} to {largest} "
        f"{unit}, median {np.median(weights):g}."
    )
    losses, found = _losses(run)
    charts = [
        losses,
        bar_chart(
            f"{unit.capitalize()} per client: {least} to {largest}.",
            edges.tolist(),
            sizes.tolist(),
            x=unit,
            y="clients",
        ),
        bar_chart(
            f"Rounds per client: up to {most} of {len(run.rounds)}.",
            [n - 0.5 for n in range(most + 2)],
            [times[n] for n in range(most + 1)],
            x="rounds taken part in",
            y="clients",
        ),
    ]
    shown = sorted(did.items(), key=lambda item: (-len(item[1]), item[0]))[:LISTED]
    first = f", the {LISTED} with the most rounds" if len(did) > LISTED else ""
    table = Table(
        "clients",
        f"Each client that took part{first}",
        [
            Column("client", "client"),
            Column("rounds", "rounds", "d"),
            Column(unit, "examples", "d"),
            Column("first loss", "first_loss", ".3f"),
            Column("last loss", "last_loss", ".3f"),
            Column("seconds a round", "seconds", ".2f"),
        ],
        [
            [
                str(client),
                len(parts),
                parts[-1].examples,
                parts[0].loss,
                parts[-1].loss,
                fmean(part.seconds for part in parts),
            ]
            for client, parts in shown
        ],
        folded=True,
    )
    return Section("Clients", [text], found, charts, [table])


def _losses(run: RecordedRun) -> tuple[Chart, list[Chart]]:
    names = ("mean by examples; band: all clients", "median; band: middle half")
    found = looks(names, names)
    # With privacy a cohort may be empty.
    trained = [done for done in run.rounds if done.clients]
    rounds = [done.round for done in trained]
    losses = [[did.loss for did in done.clients.values()] for done in trained]
    low, first, median, third, high = np.transpose(
        [np.quantile(values, (0, 0.25, 0.5, 0.75, 1)) for values in losses]
    ).tolist()
    mean = [done.train_loss for done in trained if done.train_loss is not None]
    chart = line_chart(
        "Training loss of each round's clients, each on its own examples.",
        [
            Line(names[0], found[names[0]], rounds, mean, low, high),
            Line(names[1], found[names[1]], rounds, median, first, third),
        ],
        x="round",
        y="training loss",
        whole=True,
        boundaries=_boundaries(run, lambda done: done.round),
    )
    return chart, keys(found)


def _failures(run: RecordedRun) -> Section:
    reasons: dict[str, list[Failure]] = {}
    for failure in run.failures:
        reasons.setdefault(failure.reason, []).append(failure)
    by_reason = Table(
        "reasons",
        "What was excluded from rounds, by reason, the most frequent first.",
        [
            Column("reason", "reason"),
            Column("times", "times", "d"),
            Column("nodes", "nodes", "d"),
            Column("clients", "clients", "d"),
        ],
        [
            [
                reason,
                len(failures),
                len({failure.node for failure in failures}),
                len({client for failure in failures for client in failure.clients}),
            ]
            for reason, failures in sorted(reasons.items(), key=lambda i: -len(i[1]))
        ],
    )
    first = f", the first {LISTED}" if len(run.failures) > LISTED else ""
    each = Table(
        "failures",
        f"Each failure{first}",
        [
            Column("round", "round"),
            Column("node", "node"),
            Column("clients", "clients"),
            Column("reason", "reason"),
        ],
        [
            [
                "before" if failure.round is None else str(failure.round),
                failure.node,
                _text(failure.clients),
                failure.reason,
            ]
            for failure in run.failures[:LISTED]
        ],
        folded=True,
    )
    return Section("Failures", tables=[by_reason, each])


def _config(run: RecordedRun) -> Section:
    default = flatten(RunConfig())
    columns = [Column("key", "key"), Column("value", "value")]
    differing = Table(
        "differing",
        "Values that differ from the defaults.",
        [*columns, Column("default", "default")],
        [
            [key, _text(value), _text(default.get(key))]
            for key, value in run.config.items()
            if value != default.get(key)
        ],
    )
    facts = {
        f"{section}.{key}": value
        for section, values in run.facts.items()
        for key, value in values.items()
    }
    whole = Table(
        "config",
        "The whole config, with versions and resolved values",
        columns,
        [[key, _text(value)] for key, value in (run.config | facts).items()],
        folded=True,
    )
    return Section("Config", tables=[differing, whole])


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
