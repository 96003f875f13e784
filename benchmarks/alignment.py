"""Eigen-SAM's claim, measured: does its perturbation follow the top eigenvector, and does training end flatter?

    python -m benchmarks.alignment                 # 5 seeds of the demo's ViT; about three minutes on two cores
    python -m benchmarks.alignment --model ResNet --seeds 2 --output tried

Trains with SGD, SAM and Eigen-SAM on the demo's digits: Eigen-SAM at the demo's settings, and with its pull towards the
eigenvector five times as strong and refreshed four times as often. Every 36 steps a CurvatureMonitor
measures, on the same images for all, |cos| of the perturbation with the top eigenvector (for SGD that of the
perturbation SAM would make) and the top eigenvalue. Writes alignment.json and alignment.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastsam.commands.demo import settings, train
from fastsam.commands.machine import machine, processors
from fastsam.curvature import draw_panels
from fastsam.methods.eigen import Estimate

RESULTS = Path(__file__).parent / "results"
RUNS = {
    "SGD": ("SGD", {}),
    "SAM": ("SAM", {}),
    "Eigen-SAM": ("Eigen-SAM", settings.METHODS["Eigen-SAM"]),
    "Eigen-SAM, alpha=1": ("Eigen-SAM", {"alpha": 1.0, "freq": 10, "estimate": Estimate("lanczos", products=10)}),
}
EVERY = 36  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=settings.MODELS, default="ViT")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the demo's")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    described = machine(1)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            (m, seed, options, Path(folder) / f"{m}-{seed}.csv") for seed in range(options.seeds) for m in options.runs
        ]
        workers = min(len(jobs), processors())
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            runs = list(pool.map(run, *zip(*jobs, strict=True)))
        options.output.mkdir(parents=True, exist_ok=True)
        files = {m: [path for method, _, _, path in jobs if method == m] for m in options.runs}
        draw_panels(files, options.output / "alignment.png")
    result = {
        "machine": described,
        "settings": {
            **{k: v for k, v in vars(options).items() if k != "output"},
            "model_settings": {
                k: v for k, v in dataclasses.asdict(settings.MODELS[options.model]).items() if k != "build"
            },
            "methods": {name: {k: str(v) for k, v in RUNS[name][1].items()} for name in options.runs},
            "measured_every": EVERY,
        },
        "summary": {m: summary([r for r in runs if r["method"] == m]) for m in options.runs},
        "runs": runs,
    }
    (options.output / "alignment.json").write_text(json.dumps(result, indent=1) + "\n")
    print_summary(result["summary"])


def run(name: str, seed: int, options: argparse.Namespace, path: Path) -> dict:
    """One run; its monitor writes to ``path``."""
    torch.set_num_threads(1)
    method, arguments = RUNS[name]
    chosen = settings.MODELS[options.model]
    chosen = dataclasses.replace(chosen, epochs=options.epochs or chosen.epochs)
    watched = settings.CurvatureSettings(options.model, (method,), EVERY, settings.DATA.sharpness_size)
    digits = train.digits(settings.DATA)
    _, done = train.train(options.model, chosen, method, arguments, digits, seed, curvature=(watched, path))
    return {
        "method": name,
        "seed": seed,
        "test_accuracy": done.test_accuracy[-1],
        "train_loss": done.train_loss[-1],
        "rows": done.curvature,
    }


def summary(runs: list[dict]) -> dict[str, list[float]]:
    """(mean, standard deviation) over seeds; alignment is the mean over the second half of training."""

    def half(run: dict) -> float:
        rows = run["rows"]
        return statistics.mean(r["perturbation_alignment"] for r in rows[len(rows) // 2 :])

    values = {
        "alignment": [half(run) for run in runs],
        "top_eigenvalue": [run["rows"][-1]["top_eigenvalue"] for run in runs],
        "sam_gap": [run["rows"][-1]["sam_gap"] for run in runs],
        "train_loss": [run["train_loss"] for run in runs],
        "test_accuracy": [run["test_accuracy"] for run in runs],
    }
    return {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in values.items()}


def print_summary(result: dict) -> None:
    table = Table("method", *next(iter(result.values())), title="Over seeds: mean ± standard deviation")
    for method, values in result.items():
        table.add_row(method, *(f"{mean:.3g} ± {std:.2g}" for mean, std in values.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
