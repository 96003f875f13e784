"""``report.html`` of a finished run: the table of its end and its curves, in one file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fastsam.commands.finetune.show import lines
from fastsam.commands.page import write_page


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Writes ``report.html`` and ``curves.png`` from ``result`` and the folder's ``metrics.csv``; returns the page.

    Raises ``OSError`` where they cannot be read or written.
    """
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [(name, text.replace("|", "¦")) for name, text in lines(result)]  # a bar would end a cell
    table = "| what | value |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in shown)
    _draw(rows, folder / "curves.png")
    return write_page(folder / "report.html", f"Fine-tuned: {result['model']}", table, [folder / "curves.png"])


def _draw(rows: list[dict[str, str]], path: Path) -> None:
    """Training loss, which has a row every twentieth of an epoch, and test accuracy, which has one each epoch."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 2),
        {"loss": "training loss, nats", "test_accuracy": "test images right"}.items(),
        strict=True,
    ):
        points = [(float(row["epoch"]), float(row[column])) for row in rows if row[column]]
        axes.plot(*zip(*points, strict=True), color="#0072B2", marker="." if len(points) < 40 else "")
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(path, dpi=110, metadata={"Software": "fastsam"})
