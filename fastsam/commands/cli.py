"""The ``fastsam`` command: one function for each subcommand, whose parameters are its options."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastsam
from fastsam import kernels
from fastsam.commands.bench.cli import bench
from fastsam.commands.finetune.cli import finetune
from fastsam.commands.machine import processor
from fastsam.commands.sharpness import sharpness
from fastsam.support.build import PACKAGE, foreign_files

app = typer.Typer(
    name="fastsam",
    help="Sharpness-aware optimizers on fused kernels.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


_DEVICES = ("cpu", "cuda")
_PICKED = "picked by auto"


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for a script or a bug report.")] = False,
) -> None:
    """Show versions, which backend serves which tensors and why, and this machine's processors."""
    versions, backends, machine = _versions(), _backends(), _machine()
    if as_json:
        typer.echo(json.dumps({"versions": versions, "backends": backends, "machine": machine}, indent=2))
        return
    console = Console()
    console.print(_facts("Versions", versions))
    table = Table("backend", "status", title="Backends", title_justify="left")
    for device in _DEVICES:
        table.add_column(f"{device} tensors (float32)")
    for name, row in backends.items():
        cells = (f"[bold]{_PICKED}[/bold]" if row[d] == _PICKED else escape(row[d]) for d in _DEVICES)
        table.add_row(name, escape(row["status"]), *cells)
    console.print(table)
    console.print(_facts("Machine", machine))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report, its pictures and its numbers.")] = Path(
        "fastsam-demo"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each method, instead of each model's own number.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every run, instead of each model's own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short run: tries everything, learns nothing.")] = False,
) -> None:
    """Train small networks on handwritten digits with SGD, SAM and its family; compare accuracy, sharpness, time."""
    from fastsam.commands.demo import run

    try:
        run(output=output, seeds=seeds, epochs=epochs, quick=quick)
    except (ImportError, OSError) as error:  # names the packages to install, or the file
        typer.echo(f"fastsam demo: {error}", err=True)
        raise typer.Exit(1) from None


app.command()(bench)
app.command()(sharpness)
app.command()(finetune)


def _versions() -> dict[str, str]:
    found = {
        "fastsam": f"{fastsam.__version__} (fastsam-optim)",
        "folder": str(PACKAGE),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    if foreign := foreign_files():
        found["conflict"] = (
            f"{', '.join(foreign)} of another package that imports as fastsam, such as Fast Segment Anything, lie in "
            "that folder: make a new environment for each of the two"
        )
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def _backends() -> dict[str, dict[str, str]]:
    """Each backend's status and the tensors it serves; the first that serves a device is the one ``auto`` picks."""
    picked = {device: kernels.choose("auto", torch.device(device), torch.float32) for device in _DEVICES}
    rows = {}
    for backend, status in kernels.backends().items():
        module = importlib.import_module(f"fastsam.kernels.{backend}")
        rows[backend] = {"status": status}
        for device in _DEVICES:
            if status != "available":
                served = "-"
            elif module is picked[device]:
                served = _PICKED
            else:
                served = module.refuses(torch.device(device), torch.float32) or "can serve them, but slower"
            rows[backend][device] = served
    return rows


def _machine() -> dict[str, str]:
    from fastsam.kernels import cpu

    forced = os.environ.get("FASTSAM_ISA")
    isa = f"none: {reason}" if (reason := cpu.unavailable()) else cpu.isa()
    facts = {
        "processor": processor(),
        "instruction set": f"{isa} (FASTSAM_ISA={forced})" if forced else isa,
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads), {os.cpu_count()} processors",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch can use"
    return facts


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table
