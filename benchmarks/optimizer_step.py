"""The README's table: one step of the optimizer, ``first_step`` + ``second_step``, on the CPU.

    python -m benchmarks.optimizer_step --output benchmarks/results/cpu.json

``fastsam/commands/bench/optimizer_step.py`` says how it is measured. The result is a JSON object:

    machine    as ``fastsam/commands/machine.py`` describes it
    settings   the arguments and hyper-parameters of the run
    cells      one for each set, base and method: tensors, parameters, bytes_per_parameter, floor (ms of
               each pass, their sum, GB/s, source; null for sets that fit the caches) and implementations,
               each with ms (median), q1_ms, q3_ms, first_ms, second_ms, gb_per_s, share, times_fastsam,
               compile_s, peak_mib, or with ms null and a note that says why
    host       fastsam's step on as many tensors as ViT-B/16 has, of one or two elements: the host's side
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks.report import print_tables
from fastsam.commands.bench import rivals, settings
from fastsam.commands.bench.optimizer_step import Cell, host_time
from fastsam.commands.bench.parameter_sets import parameter_set, set_names
from fastsam.commands.machine import machine


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    names = [name for name in options.rivals if not (options.no_compile and name == "compiled")]
    cells = list(itertools.product(options.sets, options.bases, options.methods))
    result: dict[str, Any] = {"machine": machine(options.threads), "settings": _settings(options)}
    earlier = json.loads(options.output.read_text()) if options.append else {"cells": [], "host": []}
    if options.append:
        result["settings"]["bases"] = {**earlier["settings"]["bases"], **result["settings"]["bases"]}
    measured_now = {(c[0], c[1], c[2]) for c in cells}
    result["cells"] = [c for c in earlier["cells"] if (c["set"], c["base"], c["method"]) not in measured_now]
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cells))
        for number, (set_name, base, method) in enumerate(cells):

            def show(what: str, done: float, place: str = f"{set_name} {base} {method}", before: int = number) -> None:
                progress.update(task, description=f"{place}: {what}", completed=before + done)

            cell = Cell(parameter_set(set_name), base, method, names, options.threads, options.compile_limit)
            result["cells"].append(cell.measure(options.repeats, show))
            if options.output:
                _write(result, options.output)
            del cell
            gc.collect()  # the largest sets would not fit twice
        host = host_time(options.bases, options.methods) if "fastsam" in names else []
        again = {(h["base"], h["method"]) for h in host}
        result["host"] = [h for h in earlier.get("host", []) if (h["base"], h["method"]) not in again] + host
    print_tables(result, console)
    if options.output:
        _write(result, options.output)
        console.print(f"written to {options.output}")
    return result


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    used = {name: settings.BASES[name] for name in options.bases}
    bases = {name: {"class": base.__name__, **keywords} for name, (base, keywords) in used.items()}
    hyper = settings.hyper_parameters()
    return {"repeats": options.repeats, "compile_limit_s": options.compile_limit, **hyper, "bases": bases}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_step", description=__doc__.split("\n")[0])

    def choice(flag: str, known: list[str], text: str, default: list[str] | None = None) -> None:
        parser.add_argument(
            flag, nargs="+", choices=known, default=default or known, metavar="NAME", help=f"{text}: {known}"
        )

    choice("--sets", set_names(), "parameter sets", ["resnet18", "wrn28-10", "vit-b16", "tiny2000"])
    choice("--methods", list(settings.METHODS), "methods", list(settings.DEFAULT_METHODS))
    choice("--bases", list(settings.BASES), "base optimizers")
    choice("--rivals", [name for name in rivals.implementation_names() if name != "fastsam-triton"], "implementations")
    parser.add_argument("--repeats", type=int, default=15, help="rounds over all implementations (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--append", action="store_true", help="keep the cells that --output has from earlier runs on this machine"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds to compile one method (default 300)")
    options = parser.parse_args(arguments)
    if options.append and not (options.output and options.output.exists()):
        parser.error("--append needs an --output file that exists")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main()
