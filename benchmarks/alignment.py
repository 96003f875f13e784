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
import math
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from fastsam.bench.machine import machine
from fastsam.curvature import CurvatureMonitor, draw_panels
from fastsam.demo import data, settings
from fastsam.demo.train import build_optimizer
from fastsam.methods.eigen import EigenSAM, Estimate

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
        workers = min(len(jobs), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            runs = list(pool.map(train, *zip(*jobs, strict=True)))
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


def train(name: str, seed: int, options: argparse.Namespace, path: Path) -> dict:
    """One run; its monitor writes to ``path``."""
    torch.set_num_threads(1)
    chosen, digits = settings.MODELS[options.model], data.load(settings.DATA)
    torch.manual_seed(seed)
    model = chosen.build()
    optimizer = build_optimizer(model, RUNS[name][0], chosen, RUNS[name][1])
    x, y = digits.sharpness_subset()
    monitor = CurvatureMonitor(optimizer, path, EVERY, model=model, method="exact", eval_mode=True, rho=chosen.rho)
    epochs = options.epochs or chosen.epochs
    batches = len(digits.train_labels) // chosen.batch_size
    steps = epochs * batches
    rows, losses, warmup, base = [], [], max(1, steps // 10), getattr(optimizer, "base_optimizer", optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        base, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warmup) / (steps - warmup)))
    )
    order = torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        rows.append(monitor(lambda: F.cross_entropy(model(x), y), step))
        if step == steps:
            break
        if step % batches == 0:
            epoch = torch.randperm(len(digits.train_labels), generator=order)
        batch = epoch[step % batches * chosen.batch_size :][: chosen.batch_size]
        losses.append(_step(model, optimizer, digits.train_images[batch], digits.train_labels[batch]))
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()
    return {
        "method": name,
        "seed": seed,
        "test_accuracy": accuracy,
        "train_loss": statistics.mean(losses[-batches:]),
        "rows": [row for row in rows if row is not None],
    }


def _step(model, optimizer, x, y) -> float:
    model.train()

    def loss_fn() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    if isinstance(optimizer, EigenSAM) and optimizer.eigenvector_due():
        optimizer.update_eigenvector(loss_fn, model)
    loss = loss_fn()
    loss.backward()
    if hasattr(optimizer, "first_step"):
        optimizer.first_step(zero_grad=True)
        loss_fn().backward()
        optimizer.second_step(zero_grad=True)
    else:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


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
