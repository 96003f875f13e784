"""A result of the throughput report as tables: rows of words, and those in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastsam.commands.bench.settings import METHODS

BASE_TITLES = {"sgd": "SGD", "adamw": "AdamW"}
COLUMNS = {
    "fastsam": "fastsam",
    "fastsam-flat": "fastsam, flattened",
    "fastsam-triton": "fastsam, Triton",
    "fastsam-graph": "fastsam, CUDA graph",
    "fastsam-triton-graph": "fastsam, Triton in a CUDA graph",
    "authors": "authors' code",
    "foreach": "foreach",
    "foreach-fused": "foreach, fused base",
    "compiled": "foreach, compiled",
    "pytorch_optimizer": "pytorch_optimizer",
}
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A header and rows of the same length; the first ``names`` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int
    notes: list[str] = field(default_factory=list)


def markdown(result: dict[str, Any]) -> str:
    """The machine, every table that has rows, and what was left out."""
    parts = ["# Throughput of fastsam", machine_line(result)]
    for table in tables(result):
        alignment = ("---",) * table.names + ("---:",) * (len(table.header) - table.names)
        lines = ["| " + " | ".join(row) + " |" for row in (table.header, alignment, *table.rows)]
        parts += [f"## {table.title}", "\n".join(lines), *table.notes]
    left_out = [f"- {each['what']}: {each['why']}" for each in result["left_out"]]
    if left_out:
        parts += ["## Not measured", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def machine_line(result: dict[str, Any]) -> str:
    """What was measured on, by which versions, when and for how long."""
    m, bandwidth = result["machine"], result.get("bandwidth")
    memory = f", {m['memory_gib']} GiB" if m["memory_gib"] else ""
    place = f"{m['cpu']} ({m['cores']} cores, {m['isa']}{memory}), {m['threads']} thread{'s' * (m['threads'] != 1)}"
    if m.get("gpu"):
        place = f"{m['gpu']} ({m['gpu_memory_gib']} GiB, CUDA {m['cuda']}), host {place}"
    copied = f"; a copy of {bandwidth['mib']} MiB: {bandwidth['gb_per_s']:.0f} GB/s" if bandwidth else ""
    seconds = f", {result['seconds']:.0f} s" if "seconds" in result else ""
    return f"{place}; torch {m['torch']}; {m['date']}{seconds}{copied}."


def tables(result: dict[str, Any]) -> list[Table]:
    """Optimizer steps, training steps, cost against parameters, cost against tensors; those that have rows."""
    made = [
        *_tables_of(result["optimizer"], ("title", "base", "dtype"), _optimizer),
        *_tables_of(result["training"], ("title", "base", "dtype", "batch"), _training),
        *(_curve(result, curve) for curve in ("parameters", "tensors") if result[curve]),
    ]
    return made


def number(ms: float) -> str:
    """Three digits, or more before the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def _optimizer(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    header = ("method", "implementation", "ms", "quartiles", "×", "GB/s", "share", "peak MiB")
    body = []
    for row in rows:
        if row["ms"] is None:
            continue
        times = f"{row['times_fastsam']:.2f}" if row["times_fastsam"] else MISSING
        share = f"{row['share']:.0%}" if row["share"] else MISSING
        body.append((*_names(row), *_times(row), times, f"{row['gb_per_s']:.1f}", share, _peak(row)))
    moved = {METHODS[row["method"]]: row["bytes_per_parameter"] for row in rows}
    notes = [
        "One first_step + second_step, gradients given: the median, and × fastsam's. "
        f"Bytes a parameter at least: {', '.join(f'{name} {count:g}' for name, count in moved.items())}. Share: the "
        "time of plain loops with the same reads and writes over this one, for sets that no cache holds. Peak: "
        "weights, gradients, state, temporaries."
    ]
    compiled = [f"{METHODS[row['method']]} {row['compile_s']:.0f} s" for row in rows if row.get("compile_s")]
    if compiled:
        notes.append(f"Compiling took: {', '.join(compiled)}.")
    notes += _not_measured(rows)
    size = f"{first['parameters'] / 1e6:.1f} M, {first['tensors']} tensors"
    title = f"Optimizer step: {first['title']} ({size}), {BASE_TITLES[first['base']]}, {first['dtype']}"
    return Table(title, header, body, 2, notes)


def _training(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    header = ("method", "implementation", "images/s", "ms", "quartiles", "plain steps", "peak MiB")
    body = []
    for row in rows:
        if row["ms"] is None:
            continue
        plain = f"{row['times_plain']:.2f}" if row["times_plain"] else MISSING
        body.append((*_names(row), number(row["images_per_s"]), *_times(row), plain, _peak(row)))
    notes = [
        "A whole step: forward, backward, climb, forward, backward, descend; Momentum-SAM's climb needs no gradient, "
        "LookSAM's time is the mean over its k steps. Plain steps: its time over that of the base optimizer alone, "
        "which has one forward and one backward pass.",
        *_not_measured(rows),
    ]
    base = BASE_TITLES[first["base"]]
    return Table(
        f"Training step: {first['title']}, {base}, {first['dtype']}, batch {first['batch']}", header, body, 2, notes
    )


def _not_measured(rows: list[dict[str, Any]]) -> list[str]:
    missing = [f"{' by '.join(_names(row))}: {row['note']}" for row in rows if row["ms"] is None]
    return [f"Not measured: {'; '.join(missing)}."] if missing else []


def _names(row: dict[str, Any]) -> tuple[str, str]:
    if row["method"] == "plain":
        return "plain", f"{BASE_TITLES[row['base']]} alone"
    return METHODS[row["method"]], COLUMNS[row["implementation"]]


def _times(row: dict[str, Any]) -> tuple[str, str]:
    return number(row["ms"]), f"{number(row['q1_ms'])}–{number(row['q3_ms'])}"


def _peak(row: dict[str, Any]) -> str:
    return MISSING if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"


def _tables_of(
    rows: list[dict[str, Any]], keys: tuple[str, ...], table: Callable[[list[dict[str, Any]]], Table]
) -> list[Table]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [table(group) for group in groups.values()]


def _curve(result: dict[str, Any], curve: str) -> Table:
    rows = result[curve]
    names = _implementations(rows)
    header = ("parameters", "tensors", *(f"{COLUMNS[name]}, ms" for name in names))
    if curve == "parameters":
        header += ("fastsam, ns a parameter",)
    body = []
    for keys, by_name in _grouped(rows, ("parameters", "tensors")):
        cells = [f"{keys[0]:,}", f"{keys[1]:,}"]
        cells += [number(by_name[name]["ms"]) if name in by_name else MISSING for name in names]
        if curve == "parameters":
            cells.append(f"{by_name['fastsam']['ns_per_parameter']:.3g}" if "fastsam" in by_name else MISSING)
        body.append(tuple(cells))
    first = rows[0]
    title = f"Cost against {curve}: {METHODS[first['method']]}, {BASE_TITLES[first['base']]}, {first['dtype']}"
    lines = " ".join(_line_notes(result, curve))
    return Table(title, header, body, 0, [lines] if lines else [])


def _line_notes(result: dict[str, Any], curve: str) -> Iterator[str]:
    for line in result["lines"]:
        if line["curve"] == curve:
            name, fixed, slope = COLUMNS[line["implementation"]], number(line["fixed_ms"]), line["slope_ns"]
            yield (
                f"{name}: {fixed} ms + {_nanoseconds(slope)} a {curve[:-1]}, no point further than "
                f"{line['worst']:.0%} from that line."
            )


def _nanoseconds(ns: float) -> str:
    return f"{ns / 1e3:.3g} µs" if ns >= 1e3 else f"{ns:.3g} ns"


def _implementations(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Those of the rows, in the order of ``COLUMNS``."""
    found = {row["implementation"] for row in rows}
    return [name for name in COLUMNS if name in found]


def _grouped(rows: list[dict], keys: tuple[str, ...]) -> Iterator[tuple[tuple, dict[str, dict]]]:
    """The rows of equal keys, by implementation, in order of appearance."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = row
    yield from groups.items()
