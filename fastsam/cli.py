"""The ``fastsam`` command: one function for each subcommand, whose parameters are its options."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastsam import kernels
from fastsam._build import version
from fastsam.bench.cli import bench
from fastsam.curvature.cli import sharpness
from fastsam.finetune.cli import finetune

app = typer.Typer(
    name="fastsam",
    help="Sharpness-aware optimizers on fused kernels.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def info() -> None:
    """Show versions, which backend serves which tensors and why, and this machine's processors."""
    console = Console()
    console.print(_facts("Versions", _versions()))
    console.print(_backends())
    console.print(_facts("Machine", _machine()))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture, the table and the numbers.")] = Path(
        "fastsam-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds 0, 1, ...")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every run, instead of each model's own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short run: tries everything, learns nothing.")] = False,
) -> None:
    """Train small networks on handwritten digits with SGD, SAM, F-SAM and Eigen-SAM, and compare them."""
    from fastsam.demo import run

    try:
        run(output=output, seeds=seeds, epochs=epochs, quick=quick)
    except (ImportError, OSError) as error:  # names the packages to install, or the file
        typer.echo(f"fastsam demo: {error}", err=True)
        raise typer.Exit(1) from None


app.command()(bench)
app.command()(sharpness)
app.command()(finetune)


def _versions() -> dict[str, str]:
    found = {"fastsam": version(), "Python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def _backends() -> Table:
    """Each backend beside the tensors it serves; the first that serves a device is the one ``auto`` picks."""
    devices = {name: torch.device(name) for name in ("cpu", "cuda")}
    table = Table("backend", "status", title="Backends", title_justify="left")
    for name in devices:
        table.add_column(f"{name} tensors (float32)")
    picked = {name: kernels.choose("auto", device, torch.float32) for name, device in devices.items()}
    for backend, status in kernels.backends().items():
        module = importlib.import_module(f"fastsam.kernels.{backend}")
        cells = []
        for name, device in devices.items():
            if status != "available":
                cells.append("-")
            elif module is picked[name]:
                cells.append("[bold]picked by auto[/bold]")
            else:
                cells.append(escape(module.refuses(device, torch.float32) or "can serve them, but slower"))
        table.add_row(backend, escape(status), *cells)
    return table


def _machine() -> dict[str, str]:
    from fastsam.kernels import cpu

    forced = os.environ.get("FASTSAM_ISA")
    isa = f"none: {reason}" if (reason := cpu.unavailable()) else cpu.isa()
    facts = {
        "processor": _processor(),
        "instruction set": f"{isa} (FASTSAM_ISA={forced})" if forced else isa,
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads), {os.cpu_count()} processors",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch can use"
    return facts


def _processor() -> str:
    """The processor's name as Linux gives it, else as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table
