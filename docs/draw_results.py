"""Draw images/accuracy-by-megabytes.svg, from the results of the study `converged`."""

import csv
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from slora_flwr.reports.charts import looks

HERE = Path(__file__).parent
STUDY = HERE.parent / "experiments" / "results" / "converged"
NAMES = {
    "slora": "SLoRA",
    "lora": "LoRA",
    "fft": "full fine-tuning",
    "sft": "sparse phase alone",
}
STYLE: dict[str, object] = {
    "font.size": 11,
    "svg.hashsalt": "slora",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def draw() -> Figure:
    """Return the mean accuracy over seeds and its range, against megabytes sent."""
    with (STUDY / "compare-curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for method, look in looks(NAMES, NAMES).items():
        points = [row for row in rows if row["group"] == method]
        megabytes, mean, low, high = (
            [float(point[column]) for point in points]
            for column in (
                "megabytes",
                "mean_percent",
                "minimum_percent",
                "maximum_percent",
            )
        )
        axes.plot(
            megabytes,
            mean,
            color=look.colour,
            marker=look.marker,
            markersize=4,
            label=NAMES[method],
        )
        axes.fill_between(
            megabytes, low, high, color=look.colour, alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    axes.set_xticks([10, 100, 1_000, 10_000], ["10", "100", "1,000", "10,000"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("megabytes of tensors sent, both directions")
    axes.set_ylabel("test accuracy, %")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right", frameon=False, labelspacing=0.3)
    return figure


if __name__ == "__main__":
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(STYLE):  # type: ignore[arg-type]
        draw().savefig(HERE / "images" / "accuracy-by-megabytes.svg", metadata=nothing)
