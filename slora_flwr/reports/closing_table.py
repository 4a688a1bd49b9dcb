"""The table printed at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from slora_flwr.config.methods import REFERENCES
from slora_flwr.reports.figures import FORMS, tell


def closing_table(summary: dict[str, Any]) -> Table:
    """Return a table of a run's metrics, and of its bytes compared with FFT and LoRA.

    With privacy of clients it has no bytes and seconds, which depend on who was drawn.

    Parameters
    ----------
    summary : dict
        The content of summary.json.
    """
    privacy = summary.get("privacy")
    is_bare = hides_traffic(privacy or {})
    seconds = "" if is_bare else f", {summary['seconds']:.0f} s"
    title = f"{summary['method']}: {tell_figures(summary)}{seconds}"
    table = Table(title=title)
    table.add_column("")
    table.add_column("rounds", justify="right")
    if is_bare:
        for name, phase in summary["phases"].items():
            table.add_row(f"{name} phase", str(phase["rounds"]))
        table.add_section()
        table.add_row(summary["method"], str(summary["rounds"]))
    else:
        _add_traffic(table, summary)
    if privacy:
        table.caption = tell_guarantee(privacy)
    return table


def tell_figures(summary: Mapping[str, Any]) -> str:
    """Return the figures on the test data, named as in summary.json, as a line."""
    if summary["accuracy"] is None:
        return "not evaluated"
    told = {name: tell(name, summary[name]) for name in FORMS if name in summary}
    if (majority := summary.get("majority_accuracy")) is not None:
        told["accuracy"] += f" (majority class {majority:.1%})"
    return ", ".join(told.values())


def _add_traffic(table: Table, summary: Mapping[str, Any]) -> None:
    """Add rows with the bytes and seconds of the phases, and those of other methods."""
    fft = summary["same_rounds"][REFERENCES[0]]
    for name in ("MB up", "down", "in all", "of FFT", "seconds"):
        table.add_column(name, justify="right")

    def row(name: str, rounds: int, up: int, down: int, seconds: float | None) -> None:
        table.add_row(
            name,
            str(rounds),
            f"{up / 1e6:,.2f}",
            f"{down / 1e6:,.2f}",
            f"{(up + down) / 1e6:,.2f}",
            f"{(up + down) / (2 * fft):.2%}",
            "-" if seconds is None else f"{seconds:.0f}",
        )

    for name, phase in summary["phases"].items():
        row(
            f"{name} phase",
            phase["rounds"],
            phase["payload_bytes_up"],
            phase["payload_bytes_down"],
            phase["seconds"],
        )
    table.add_section()
    row(
        summary["method"],
        summary["rounds"],
        summary["payload_bytes_up"],
        summary["payload_bytes_down"],
        summary["seconds"],
    )
    for other, size in summary["same_rounds"].items():
        row(f"{other}, same rounds", summary["rounds"], size, size, None)
    table.caption = (
        "payload: bytes of the tensors, counting each client as if it were a separate "
        "node; ledger.csv also has the message bytes"
    )


def hides_traffic(privacy: Mapping[str, Any]) -> bool:
    """Return whether bytes and seconds tell of what the guarantee hides."""
    return bool(privacy) and privacy.get("unit", "client") == "client"


def tell_guarantee(privacy: Mapping[str, Any]) -> str:
    """Return the guarantee of a run with privacy, given `Privacy.facts`."""
    unit, noise = privacy.get("unit", "client"), privacy["noise_multiplier"]
    return (
        f"for each {unit} ({privacy['epsilon']:.3g}, {privacy['delta']:.2g})-"
        f"differentially private at noise multiplier {noise:.3g}"
    )
