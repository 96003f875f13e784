"""Pictures of a table's runs: curvature over training, and the six panels of the SDEs. They need matplotlib."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from benchmarks.papers import jobs
from benchmarks.papers.sde_runs import PANELS
from benchmarks.papers.tables import Row, split_name
from fastsam.curvature import draw_panels

# Okabe and Ito's colours, told apart with any colour vision; the dashes tell them apart in grey.
STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#009E73", (0, (1, 1))), ("#0072B2", "-."), ("#D55E00", (0, (5, 1))))


def draw_curvature(record: dict, output: Path) -> None:
    """``curvature-LINE.png``: alignment and top eigenvalue over steps, a line for each method."""
    for line, methods in _lines(record).items():
        runs = {m: [folder / "curvature.csv" for folder in _folders(entry, output)] for m, entry in methods.items()}
        draw_panels(runs, output / f"curvature-{_file(line)}.png")


def draw_paths(record: dict, output: Path) -> None:
    """``panels-LINE.png``: the six panels over time, each process's mean over seeds and its standard deviation."""
    from matplotlib.figure import Figure

    for line, processes in _lines(record).items():
        figure = Figure(figsize=(12, 6.5), layout="constrained")
        for axes, (column, label) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
            for (process, entry), (colour, dashes) in zip(processes.items(), STYLES * len(processes), strict=False):
                steps, mean, spread = _over_seeds([f / "metrics.csv" for f in _folders(entry, output)], column)
                axes.plot(steps, mean, color=colour, linestyle=dashes, label=process)
                low, high = ([m + s * d for m, d in zip(mean, spread, strict=True)] for s in (-1, 1))
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_xlabel("step of SAM, or time / lr")
            axes.set_ylabel(label)
        figure.axes[0].legend(frameon=False)
        figure.savefig(output / f"panels-{_file(line)}.png", dpi=120)


def _lines(record: dict) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for entry in record["rows"]:
        line, method = split_name(entry["name"])
        found.setdefault(line, {})[method] = entry
    return found


def _folders(entry: dict, output: Path) -> list[Path]:
    return [jobs.folder_of(Row(entry["name"], None), run["seed"], output) for run in entry["runs"]]


def _over_seeds(paths: list[Path], column: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and standard deviations."""
    seeds = []
    for path in paths:
        with path.open(newline="") as file:
            seeds.append({int(row["step"]): float(row[column]) for row in csv.DictReader(file)})
    steps = sorted(set.intersection(*map(set, seeds)))
    means = [sum(seed[s] for seed in seeds) / len(seeds) for s in steps]
    if len(seeds) == 1:
        return steps, means, [0.0] * len(steps)
    squares = [sum((seed[s] - m) ** 2 for seed in seeds) for s, m in zip(steps, means, strict=True)]
    return steps, means, [math.sqrt(q / (len(seeds) - 1)) for q in squares]


def _file(line: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in line).strip("-")
