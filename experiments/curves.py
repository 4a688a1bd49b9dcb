"""Draw accuracy against rounds and against megabytes for finished runs.

    python experiments/curves.py experiments/results/20newsgroups-minilm

Reads `events.jsonl` and `summary.json` of each run directory in the folder; writes
`curves.csv` and `curves.svg` there and prints a Markdown table. matplotlib comes with
flwr-datasets.
"""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt


def evaluated_rounds(run: Path) -> list[dict[str, Any]]:
    """List the events of a run's rounds that were evaluated."""
    lines = (run / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event for event in events if "accuracy" in event]


def main(folder: Path) -> None:
    """Write the curves of all runs in a folder."""
    runs = sorted(path.parent for path in folder.glob("*/summary.json"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    rows = []
    print("| run | accuracy | mean of last 5 | macro-F1 | MB up | MB down | seconds |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        events = evaluated_rounds(run)
        summary = json.loads((run / "summary.json").read_text())
        rows += [
            {
                "run": run.name,
                "round": event["round"],
                "phase": event["phase"],
                "payload_megabytes": round(event["payload_bytes"] / 1e6, 3),
                "accuracy": event["accuracy"],
                "macro_f1": event["macro_f1"],
                "loss": event["loss"],
            }
            for event in events
        ]
        accuracy = [100 * event["accuracy"] for event in events]
        axes[0].plot([e["round"] for e in events], accuracy, "o-", ms=3, label=run.name)
        megabytes = [event["payload_bytes"] / 1e6 for event in events]
        axes[1].plot(megabytes, accuracy, "o-", ms=3)
        print(
            f"| `{run.name}` | {summary['accuracy']:.1%} | {fmean(accuracy[-5:]):.1f}% "
            f"| {summary['macro_f1']:.3f} | {summary['payload_bytes_up'] / 1e6:.1f} "
            f"| {summary['payload_bytes_down'] / 1e6:.1f} "
            f"| {summary['seconds']:.0f} |"
        )
    axes[0].set(xlabel="round", ylabel="accuracy, %")
    axes[1].set(xlabel="MB of tensors, both directions", xscale="log")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "curves.svg")
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
