"""The table printed at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from slora_flwr.config.methods import REFERENCES


def closing_table(summary: dict[str, Any]) -> Table:
    """Return a table of a run's metrics, and of its bytes compared with FFT and LoRA.

    Parameters
    ----------
    summary : dict
        The content of summary.json.
    """
    figures = "not evaluated"
    if summary["accuracy"] is not None:
        figures = (
            f"accuracy {summary['accuracy']:.1%} "
            f"(majority class {summary['majority_accuracy']:.1%}), "
            f"macro-F1 {summary['macro_f1']:.3f}, loss {summary['loss']:.3f}"
        )
    title = f"{summary['method']}: {figures}, {summary['seconds']:.0f} s"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("rounds", "MB up", "MB down", "MB in all", "share of FFT", "seconds"):
        table.add_column(name, justify="right")
    fft = summary["same_rounds"][REFERENCES[0]]

    def row(name: str, rounds: int, up: int, down: int, seconds: float | None) -> None:
        table.add_row(
            name,
            str(rounds),
            f"{up / 1e6:.2f}",
            f"{down / 1e6:.2f}",
            f"{(up + down) / 1e6:.2f}",
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
    if privacy := summary.get("privacy"):
        table.caption += f"\n{_guarantee(privacy)}"
    return table


def _guarantee(privacy: Mapping[str, float]) -> str:
    """Return the guarantee of a run with privacy, given `Privacy.facts`."""
    return (
        f"for each client ({privacy['epsilon']:.3g}, {privacy['delta']:.2g})-"
        f"differentially private at noise multiplier {privacy['noise_multiplier']:.3g}"
    )
