"""A short search for the settings of a table's rows, on images held out of the training set.

    python -m benchmarks.papers.search digits --output runs/digits-search

Every row gets the same budget: DRAWS random settings, each with one seed. The draws are the same for every method:
learning rate, weight decay and, where a method has them, rho, lmbda and alpha. The last VALIDATION images of the
training set, with their right labels, are what accuracy is measured on, never the test set.
The result is written to benchmarks/results/TABLE_search.json, and what to put into the table's file is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.papers import jobs, tables
from benchmarks.papers.methods import METHODS
from benchmarks.papers.results import ROOT
from benchmarks.papers.settings import TrainSettings
from fastsam.commands.machine import machine
from fastsam.commands.training.run import write_json

DRAWS, VALIDATION = 8, 250
RHO = {"ASAM": (0.5, 4.0)}  # relative to the weights; the others' is SAM_RHO
SAM_RHO = (0.05, 0.5)
LR = {"small ViT": (0.01, 0.1), "small ResNet": (0.03, 0.3)}
WEIGHT_DECAY = (5e-4, 5e-3)
CHOICES = {"lmbda": (0.6, 0.9, 0.95), "alpha": (0.05, 0.1, 0.2)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers.search", description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("--rows", nargs="+", metavar="ROW")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the runs; a search that was killed goes on"
    )
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    console = Console()
    table = tables.read(options.table)
    rows = tables.chosen(table.rows, options.rows)

    trials = {(row.name, i): _trial(row, draw(i, row.settings)) for i in range(DRAWS) for row in rows}
    workers = jobs.processes(options.workers, len(trials))
    finished, failed = jobs.run_all([(t, 1) for t in trials.values()], options.output, None, workers, math.inf, console)
    if failed:
        raise RuntimeError(f"{failed[0][0]}: {failed[0][2]}")
    entries = []
    for row in rows:
        tried = [
            {**draw(i, row.settings), "accuracy": finished[trials[row.name, i].name, 1]["test_accuracy"]}
            for i in range(DRAWS)
        ]
        best = {k: v for k, v in max(tried, key=lambda t: t["accuracy"]).items() if k != "accuracy"}
        entries.append({"name": row.name, "best": best, "tried": tried})
        where = {k: getattr(row.settings, k) for k in ("network", "label_noise", "method")}
        console.print(f"\n[[override]]\nwhere = {_inline(where)}\nset = {_inline(best)}", markup=False, soft_wrap=True)
    budget = {"draws": DRAWS, "seeds": 1, "validation": VALIDATION, "lr": LR, "weight_decay": WEIGHT_DECAY}
    write_json(
        ROOT / "benchmarks" / "results" / f"{table.name}_search.json",
        {
            "machine": machine(1),
            "budget": {**budget, "rho": SAM_RHO, "rho of ASAM": RHO["ASAM"], **CHOICES},
            "rows": entries,
        },
    )
    return 0


def draw(i: int, settings: TrainSettings) -> dict[str, float]:
    """The i-th settings for a row's network and method, log-uniform or one of CHOICES, to two significant digits."""
    numbers = random.Random(i)
    method, own = settings.method, METHODS[settings.method][1]
    values = {"lr": _log_uniform(numbers, *LR[settings.network]), "weight_decay": _log_uniform(numbers, *WEIGHT_DECAY)}
    rho = _log_uniform(numbers, *RHO.get(method, SAM_RHO))
    if "rho" in own:
        values["rho"] = rho
    for name, choices in CHOICES.items():
        chosen = numbers.choice(choices)
        if name in own:
            values[name] = chosen
    return values


def _trial(row: tables.Row, values: dict[str, float]) -> tables.Row:
    settings = dataclasses.replace(row.settings, validation=VALIDATION, **values)
    return tables.Row("/".join([row.name, *(f"{k}={v}" for k, v in values.items())]), settings)


def _log_uniform(numbers: random.Random, low: float, high: float) -> float:
    return float(f"{math.exp(numbers.uniform(math.log(low), math.log(high))):.2g}")


def _inline(values: dict) -> str:
    words = (f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in values.items())
    return "{ " + ", ".join(words) + " }"


if __name__ == "__main__":
    sys.exit(main())
