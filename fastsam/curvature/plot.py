"""Pictures: the paper's two panels, alignment and top eigenvalue over training, and the density of eigenvalues."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastsam.curvature.measure import SpectralDensity

PANELS = (
    ("perturbation_alignment", "alignment of the perturbation\nwith the top eigenvector, |cos|"),
    ("top_eigenvalue", "top eigenvalue of the Hessian"),
)

# Okabe and Ito's colours, told apart with any colour vision; the dashes tell them apart in grey.
_STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#009E73", (0, (1, 1))), ("#0072B2", "-."), ("#D55E00", "-"))

# Student's t at 97.5 %, by degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def draw_panels(runs: Mapping[str, Iterable[str | Path]], output: str | Path) -> None:
    """Draws CSV files of :class:`~fastsam.curvature.CurvatureMonitor` as a picture with two panels.

    ``runs`` gives for each method the files of its seeds; the line is their mean at each step that all of them
    have, the band its 95 % confidence interval. Raises ``ValueError`` for a method without files or common steps,
    ``ImportError`` if matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        lowest = math.inf
        for (method, paths), (colour, dashes) in zip(runs.items(), _STYLES * len(runs), strict=False):
            steps, means, halves = _over_seeds(method, list(paths), name)
            lowest = min(lowest, *means)
            axes.plot(steps, means, color=colour, linestyle=dashes, label=method)
            low, high = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
            low = [b if b > 0 or m <= 0 else 1e-9 for b, m in zip(low, means, strict=True)]  # for a logarithmic axis
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if name == PANELS[0][0]:
            axes.set_ylim(0, 1)
        elif lowest > 0:
            axes.set_yscale("log")
            axes.set_ylim(bottom=lowest / 2)
        axes.legend(frameon=False)
    figure.savefig(output, dpi=150)


def draw_density(density: SpectralDensity, output: str | Path) -> None:
    """Draws what :func:`~fastsam.curvature.spectral_density` found. Raises ``ImportError`` if matplotlib is missing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(density.grid, density.density.clamp_min(1e-7), color="black")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density")
    figure.savefig(output, dpi=150)


def _over_seeds(method: str, paths: list, name: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and half widths of the 95 % interval."""
    seeds = [_read(path, name) for path in paths]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        raise ValueError(f"the runs of {method!r} have no step in common")
    means, halves = [], []
    for step in steps:
        values = [seed[step] for seed in seeds]
        n, mean = len(values), sum(values) / len(values)
        means.append(mean)
        if n == 1:
            halves.append(0.0)
            continue
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        halves.append((_T[n - 2] if n - 2 < len(_T) else 1.96) * spread / math.sqrt(n))
    return steps, means, halves


def _read(path: str | Path, name: str) -> dict[int, float]:
    with open(path, newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file)}
