"""Tables of a benchmark result: on the terminal, as Markdown, and in the README.

Print it, rewrite the block between the marks of a README, or fail if that block is out of date:

    python -m benchmarks.report benchmarks/results/cpu.json
    python -m benchmarks.report benchmarks/results/cpu.json --readme README.md
    python -m benchmarks.report benchmarks/results/cpu.json --readme README.md --check

A result of ``benchmarks/gpu.py`` has marks of its own, ``<!-- gpu:begin -->`` and ``<!-- gpu:end -->``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.marks import with_block
from fastsam.commands.bench import tables
from fastsam.commands.bench.settings import METHODS
from fastsam.commands.bench.tables import BASE_TITLES, COLUMNS, number

GPU_SHARED = ("title", "base", "dtype", "batch", "method")  # what a row of a GPU's tables has in common, if it has it
OURS = ("fastsam", "fastsam-flat")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file written by benchmarks.optimizer_step or benchmarks.gpu")
    parser.add_argument("--readme", type=Path, help="file whose benchmark block is to be rewritten")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the block is out of date")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text())
    if options.readme is None:
        print(gpu_markdown(result)) if of_gpu(result) else print_tables(result, Console())
        return 0
    current = options.readme.read_text()
    updated = with_benchmark_block(current, result)
    if options.check:
        if updated != current:
            print(f"{options.readme}: the benchmark block is not what {options.result} says", file=sys.stderr)
        return int(updated != current)
    options.readme.write_text(updated)
    return 0


def with_benchmark_block(text: str, result: dict[str, Any]) -> str:
    """``text`` with everything between the marks for such a result replaced by its tables.

    Raises ``ValueError`` unless the text has exactly one pair of marks, in order.
    """
    name, table = ("gpu", gpu_markdown) if of_gpu(result) else ("benchmark", markdown)
    return with_block(text, name, table(result))


def of_gpu(result: dict[str, Any]) -> bool:
    """Whether ``benchmarks/gpu.py`` wrote it, and not ``benchmarks/optimizer_step.py``."""
    return "optimizer" in result


def gpu_markdown(result: dict[str, Any]) -> str:
    """The machine, the optimizer steps with the share of the bandwidth, and the training steps in plain steps."""
    optimizer = [row for row in result["optimizer"] if row["ms"] is not None]
    training = [row for row in result["training"] if row["ms"] is not None and row["method"] != "plain"]
    parts = [
        tables.machine_line(result),
        _gpu_table("optimizer step", optimizer, lambda row: row["share"] and f"{row['share']:.0%} of a copy"),
        _gpu_table("training step", training, lambda row: row["times_plain"] and f"{row['times_plain']:.2f} plain"),
    ]
    return "\n\n".join(filter(None, parts))


def _gpu_table(title: str, rows: list[dict[str, Any]], note: Callable[[dict[str, Any]], str | None]) -> str:
    """A line for each case; for each implementation ms of a step, for fastsam's what ``note`` says, else the ratio."""
    if not rows:
        return ""
    names = [name for name in COLUMNS if any(row["implementation"] == name for row in rows)]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(key) for key in GPU_SHARED), {})[row["implementation"]] = row
    lines = [[title, *(COLUMNS[name] for name in names)], ["---", *["---:"] * len(names)]]
    for (model, base, dtype, batch, method), by_name in cases.items():
        case = [model, METHODS[method], BASE_TITLES[base], dtype, *([f"batch {batch}"] if batch else [])]
        lines.append([", ".join(case), *(_gpu_cell(by_name.get(name), note) for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gpu_cell(row: dict[str, Any] | None, note: Callable[[dict[str, Any]], str | None]) -> str:
    if row is None:
        return tables.MISSING
    if "times_plain" in row or row["implementation"].startswith("fastsam"):
        said = note(row)
    else:
        said = row["times_fastsam"] and f"{row['times_fastsam']:.1f}×"
    return f"{number(row['ms'])} ms" + (f" ({said})" if said else "")


def markdown(result: dict[str, Any]) -> str:
    """The machine, the table and the host's time: a README section's worth."""
    return "\n\n".join(filter(None, (machine_line(result), markdown_table(result), host_line(result))))


def markdown_table(result: dict[str, Any]) -> str:
    """A row for each cell: median ms of a step, fastsam's share of the bandwidth, and for each rival how many
    times fastsam is faster."""
    header, *rows = _rows(result)
    alignment = ["---"] * 3 + ["---:"] * (len(header) - 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, alignment, *rows))


def print_tables(result: dict[str, Any], console: Console) -> None:
    """The same on the terminal, cell by cell, with the floor, the quartiles and both halves of the step."""
    console.print(machine_line(result))
    for cell in result["cells"]:
        console.print(_cell_table(cell))
    console.print(host_line(result))


def machine_line(result: dict[str, Any]) -> str:
    m = result["machine"]
    memory = f", {m['memory_gib']} GiB" if m["memory_gib"] else ""
    rival = f", pytorch_optimizer {m['pytorch_optimizer']}" if m["pytorch_optimizer"] else ""
    return (
        f"{m['cpu']} ({m['cores']} cores, {m['isa']}{memory}), {_count(m['threads'], 'thread')}, "
        f"torch {m['torch']}{rival}, {m['date']}; median of {_count(result['settings']['repeats'], 'round')}."
    )


def host_line(result: dict[str, Any]) -> str:
    host = result.get("host") or []
    if not host:
        return ""
    parts = [f"{METHODS[h['method']]} over {BASE_TITLES[h['base']]} {h['ms']:.2f} ms" for h in host]
    return f"The host's side of one step with {host[0]['tensors']} tensors: {', '.join(parts)}."


def _rows(result: dict[str, Any]) -> list[list[str]]:
    measured = {name for cell in result["cells"] for name in cell["implementations"]}
    columns = {name: title for name, title in COLUMNS.items() if name in measured}
    rivals = {name: title for name, title in columns.items() if name not in OURS}
    ours = [columns[name] for name in OURS if name in columns]
    rows = [["parameters", "base", "method", *ours, "of bandwidth", *rivals.values()]]
    for cell in result["cells"]:
        implementations = cell["implementations"]
        fastsam = implementations.get("fastsam", {})
        rows.append(
            [
                f"{cell['title']} ({_millions(cell['parameters'])}, {cell['tensors']} tensors)",
                BASE_TITLES[cell["base"]],
                METHODS[cell["method"]],
                *(_time(implementations.get(name)) for name in OURS if name in columns),
                f"{fastsam['share']:.0%}" if fastsam.get("share") else "–",
                *(_time(implementations.get(name), ratio=True) for name in rivals),
            ]
        )
    return rows


def _cell_table(cell: dict[str, Any]) -> Table:
    implementations, floor = cell["implementations"], cell["floor"]
    caption = [f"{cell['tensors']} tensors, {_millions(cell['parameters'])} parameters; times in ms"]
    if floor:
        caption.append(f"floor: {cell['bytes_per_parameter']:g} bytes a parameter at the speed of {floor['source']}")
    caption += [f"{name}: {i['note']}" for name, i in implementations.items() if i["ms"] is None]
    compile_times = {name: i["compile_s"] for name, i in implementations.items() if i.get("compile_s")}
    caption += [f"{name}: compiled in {seconds:.0f} s" for name, seconds in compile_times.items()]
    table = Table(
        title=f"{cell['title']}, {METHODS[cell['method']]} over {BASE_TITLES[cell['base']]}",
        caption="\n".join(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for title in ("step", "×", "quartiles", "first", "second", "GB/s", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    if floor:
        first = floor["passes_ms"]["gram"] + floor["passes_ms"]["climb"]
        second = floor["passes_ms"]["guard"] + floor["passes_ms"]["descend"]
        halves = number(first), number(second)
        table.add_row("floor", number(floor["ms"]), "", "", *halves, f"{floor['gb_per_s']:.1f}", "100%")
    for name, i in implementations.items():
        if i["ms"] is None:
            continue
        table.add_row(
            name,
            number(i["ms"]),
            f"{i['times_fastsam']:.2f}" if i["times_fastsam"] else "",
            f"{number(i['q1_ms'])}–{number(i['q3_ms'])}",
            number(i["first_ms"]),
            number(i["second_ms"]),
            f"{i['gb_per_s']:.1f}",
            f"{i['share']:.0%}" if i["share"] else "–",
        )
    return table


def _time(measured: dict[str, Any] | None, ratio: bool = False) -> str:
    if measured is None:
        return "not run"
    if measured["ms"] is None:
        return measured["note"]
    times = f" ({measured['times_fastsam']:.1f}×)" if ratio and measured["times_fastsam"] else ""
    return f"{number(measured['ms'])} ms{times}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
