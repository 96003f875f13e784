"""``fastsam bench``: the throughput report."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastsam.commands.page import writable_folder, write_page

if TYPE_CHECKING:
    from rich.console import Console

    from fastsam.commands.bench.throughput import Plan

_GPU_ROUNDS, _CPU_ROUNDS = 15, 7
_GPU_BATCHES, _CPU_BATCHES = (8, 128), (8,)


def bench(
    output: Annotated[Path, typer.Option(help="Folder for the numbers, the table and the pictures.")] = Path(
        "fastsam-bench"
    ),
    part: Annotated[
        list[str] | None,
        typer.Option(help="optimizer, training, parameters or tensors; may be repeated, as all names."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="resnet18, resnet50, wrn28-10, vit-b16, vit-l16, demo-resnet, demo-vit, gpt-1.3b or tiny2000."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="sam, fsam, eigensam, momentumsam; not without being named gsam, wsam, looksam, stablesam, vasso."
        ),
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="sgd or adamw.")] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help="authors, foreach, foreach-fused, compiled, pytorch_optimizer, fastsam-flat, fastsam-triton or none."
        ),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 (weights) or bf16-autocast.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images in a training step.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU, instead of torch's number.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each time.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="About how long; what does not fit is left out.")] = 3.0,
    against: Annotated[Path | None, typer.Option(help="An earlier results.json to compare with.")] = None,
    threshold: Annotated[float, typer.Option(min=0.0, help="0.1: slower by 10 % fails, beyond the quartiles.")] = 0.1,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: tries everything, measures nothing.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure bytes a parameter instead of times: --model, --base, --device.")
    ] = False,
) -> None:
    """Measure optimizer step and training step against other implementations, on this machine.

    Writes results.json, table.md and pictures. With --against exits with 1 where fastsam became slower.
    """
    from rich.console import Console

    from fastsam.commands.bench.agreement import Disagreement

    console = Console()
    try:
        if memory:
            return _memory(model, base, device, threads, output, console)
        _check_packages()
        plan = _plan(part, model, method, base, rival, dtype, batch, device, threads, rounds, minutes, quick)
        earlier = _earlier(against, plan)
        writable_folder(output)
        result = _run(plan, output, console)
        written = _write_all(result, output)
        _print(result, [*written, output / "table.md", output / "results.json"], console)
        slower = _print_changes(result, earlier, threshold, console) if earlier else []
    except (ValueError, OSError, ImportError, Disagreement) as error:
        typer.echo(f"fastsam bench: {error}", err=True)
        raise typer.Exit(1) from None
    if slower:
        typer.echo(f"fastsam bench: slower by more than {threshold:.0%} than {against}: {len(slower)}", err=True)
        raise typer.Exit(1)


def _check_packages() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the pictures need matplotlib: pip install 'fastsam-optim[bench]'")


def _plan(part, model, method, base, rival, dtype, batch, device, threads, rounds, minutes, quick) -> Plan:
    """The plan with the defaults of the device. Raises ``ValueError`` for names that are unknown."""
    import torch

    from fastsam.commands.bench.parameter_sets import set_names
    from fastsam.commands.bench.rivals import implementation_names
    from fastsam.commands.bench.settings import BASES, DEFAULT_METHODS, METHODS, PRECISIONS, known
    from fastsam.commands.bench.throughput import PARTS, Plan

    device = _device(device)
    on_gpu = torch.device(device).type == "cuda"
    torch.set_num_threads(threads or torch.get_num_threads())
    chosen: dict[str, Any] = {
        "parts": known("part", part or PARTS, PARTS),
        "methods": known("method", method or DEFAULT_METHODS, METHODS),
        "bases": known("base", base or ("sgd",), BASES),
        "dtypes": known("dtype", dtype or ("fp32",), PRECISIONS),
        "batches": dict.fromkeys(batch or (_GPU_BATCHES if on_gpu else _CPU_BATCHES)),
    }
    if model:
        chosen["models"] = chosen["training_models"] = known("model", model, set_names())
    elif on_gpu:
        chosen["training_models"] = Plan.models
    if rival:
        rivals = [name for name in known("rival", rival, [*implementation_names(), "none"]) if name != "none"]
        chosen["rivals"] = chosen["training_rivals"] = rivals
    lists: dict[str, Any] = {key: tuple(names) for key, names in chosen.items()}
    return Plan(
        **lists,
        device=device,
        threads=torch.get_num_threads(),
        rounds=rounds or (3 if quick else _GPU_ROUNDS if on_gpu else _CPU_ROUNDS),
        seconds=60 * minutes,
        quick=quick,
    )


def _memory(model, base, device, threads, output: Path, console: Console) -> None:
    """The table of memory; weights, gradients and base optimizer in float32."""
    import torch

    from fastsam.commands.bench import memory
    from fastsam.commands.bench.parameter_sets import set_names
    from fastsam.commands.bench.settings import BASES, known

    models, bases = known("model", model or ("vit-b16",), set_names()), known("base", base or BASES, BASES)
    writable_folder(output)
    with console.status("") as status:
        rows = memory.measure(models, bases, _device(device), threads or torch.get_num_threads(), status.update)
    console.print(memory.markdown(rows), highlight=False, markup=False, soft_wrap=True)
    for path in memory.write(rows, output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is unknown: choose cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} cannot be timed: choose cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r}: torch finds no GPU")
    return name


def _earlier(path: Path | None, plan: Plan) -> dict[str, Any] | None:
    """The result to compare with, checked before anything is measured."""
    if path is None:
        return None
    from fastsam.commands.bench import compare
    from fastsam.commands.machine import machine

    earlier = compare.load(path)
    compare.check_same_device(machine(plan.threads, plan.device), earlier["machine"])
    return earlier


def _run(plan: Plan, output: Path, console: Console) -> dict[str, Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from fastsam.commands.bench.throughput import run

    columns = BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0)
        return run(
            plan,
            lambda what, done: progress.update(task, description=what, completed=done),
            lambda result: _write_json(result, output / "results.json"),
        )


def _write_all(result: dict[str, Any], output: Path) -> list[Path]:
    from fastsam.commands.bench.plots import draw
    from fastsam.commands.bench.tables import markdown

    _write_json(result, output / "results.json")
    (output / "table.md").write_text(markdown(result))
    pictures = draw(result, output)
    return [*pictures, write_page(output / "report.html", "Throughput of fastsam", markdown(result), pictures)]


def _write_json(result: dict[str, Any], path: Path) -> None:
    """In one step: a run that is stopped, or a full disk, leaves the last whole file."""
    unfinished = path.with_suffix(".json.new")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, path)


def _print(result: dict[str, Any], written: list[Path], console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fastsam.commands.bench.tables import machine_line, tables

    console.print(machine_line(result), highlight=False)
    for table in tables(result):
        drawn = Table(
            title=table.title,
            caption=escape("\n".join(table.notes)),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        for i, title in enumerate(table.header):
            drawn.add_column(title, justify="left" if i < table.names else "right")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        console.print(drawn)
    for each in result["left_out"]:
        console.print(f"not measured: {each['what']}: {each['why']}", highlight=False, markup=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _print_changes(result: dict, earlier: dict, threshold: float, console: Console) -> list:
    """The changes against the earlier result; those that are slower."""
    from rich.table import Table

    from fastsam.commands.bench.compare import changes, other_versions

    found = changes(result, earlier, threshold)
    for difference in other_versions(result["machine"], earlier["machine"]):
        console.print(f"not the same: {difference}", highlight=False)
    drawn = Table("fastsam's", "before, ms", "now, ms", "ratio", "", title="Against the earlier result", box=None)
    for change in found:
        if change.verdict != "same":
            drawn.add_row(
                change.what, f"{change.before_ms:.3f}", f"{change.after_ms:.3f}", f"{change.ratio:.2f}", change.verdict
            )
    if drawn.row_count:
        console.print(drawn)
    same = sum(change.verdict == "same" for change in found)
    console.print(f"{same} of {len(found)} of fastsam's times are as before, to {threshold:.0%} and their quartiles")
    return [change for change in found if change.verdict == "slower"]
