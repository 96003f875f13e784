"""The outcome of a table: JSON, a Markdown table of mean ± standard deviation beside the papers' figures, pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path

from benchmarks.marks import rewrite
from benchmarks.papers import pictures
from benchmarks.papers.tables import Row, Table, split_name
from fastsam.commands.machine import machine
from fastsam.commands.page import write_page
from fastsam.commands.training.run import write_json

ROOT = Path(__file__).parents[2]
METRICS = {"test_accuracy": 1, "top_eigenvalue": 1, "alignment": 3}  # digits after the point


def collect(table: Table, rows: list[Row], finished: dict[tuple[str, int], dict], command: str) -> dict:
    """Everything about the runs in JSON's types: each run, and mean and standard deviation over seeds.

    ``command`` says how long the command took, or that it went on with an earlier one.
    """
    entries = []
    for row in rows:
        runs = [{"seed": seed, **result} for (name, seed), result in sorted(finished.items()) if name == row.name]
        if not runs:
            continue
        summary = {}
        for metric in METRICS:
            values = [run[metric] for run in runs if metric in run]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                summary[metric] = {"mean": statistics.mean(values), "std": spread, "runs": len(values)}
        entries.append(
            {"name": row.name, "settings": settings_of(row), "reported": row.reported, **summary, "runs": runs}
        )
    return _finite(
        {
            "table": table.name,
            "kind": table.kind,
            "title": table.title,
            "source": table.source,
            "note": table.note,
            "command": command,
            "machine": machine(1),
            "rows": entries,
        }
    )


def write(record: dict, output: Path, kind: str) -> None:
    """``results.json``, ``results.md``, pictures where there is something to draw, and all in ``report.html``."""
    write_json(output / "results.json", record)
    (output / "results.md").write_text(markdown(record) + "\n")
    if kind == "sde":
        pictures.draw_paths(record, output)
    elif any("top_eigenvalue" in entry for entry in record["rows"]):
        pictures.draw_curvature(record, output)
    write_page(output / "report.html", record["title"], markdown(record), sorted(output.glob("*.png")))


def commit(record: dict, name: str, output: Path) -> None:
    """``benchmarks/results/NAME_table.json``, pictures beside it, and the block of that name in ``docs/papers.md``."""
    path = ROOT / "benchmarks" / "results" / f"{name}_table.json"
    path.write_text(json.dumps(record, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")
    rewrite(ROOT / "docs" / "papers.md", name, markdown(record))
    for picture in output.glob("*.png"):
        shutil.copy(picture, path.with_name(f"{name}-{picture.name}"))


def markdown(record: dict) -> str:
    """One table for each metric: what the rows have in common down, their last words (the methods) across."""
    metrics = [m for m in METRICS if any(m in entry for entry in record["rows"])]
    parts = []
    for metric in metrics:
        if len(metrics) > 1:
            parts.append(f"**{metric.replace('_', ' ')}**\n")
        parts.append(_pivot(record["rows"], metric) + "\n")
    return "\n".join([*parts, _caption(record)])


def _pivot(rows: list[dict], metric: str) -> str:
    columns = list(dict.fromkeys(split_name(entry["name"])[1] for entry in rows))
    cells: dict[str, dict[str, str]] = {}
    for entry in rows:
        line, column = split_name(entry["name"])
        if metric in entry:
            cells.setdefault(line, {})[column] = _cell(entry, metric)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {line} | {' | '.join(found.get(c, '–') for c in columns)} |" for line, found in cells.items()]
    return "\n".join(lines)


def _cell(entry: dict, metric: str) -> str:
    digits, mean, spread = METRICS[metric], entry[metric]["mean"], entry[metric]["std"]
    if mean is None:
        return "not finite"
    text = f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    reported = entry["reported"]
    return text if reported is None or metric != "test_accuracy" else f"{text} (reported: {reported['value']})"


def _caption(record: dict) -> str:
    runs = [len(entry["runs"]) for entry in record["rows"]]
    seeds = str(runs[0]) if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)}"
    seconds = sum(run["seconds"] for entry in record["rows"] for run in entry["runs"])
    sources = sorted({entry["reported"]["source"] for entry in record["rows"] if entry["reported"]})
    spread = "mean ± standard deviation over" if max(runs) > 1 else "of"
    words = [
        f"{record['title']}. Test accuracy in per cent at the end of training, {spread} {seeds} "
        f"seed{'s' * (max(runs) > 1)}. Runs: {sum(runs)}, {seconds / 60:.1f} minutes together, {record['command']}, "
        f"on {record['machine']['cpu']}, {record['machine']['date'][:10]}.",
        record["note"],
        f"Reported: {'; '.join(sources)}." if sources else "",
        f"Source of the table: {record['source']}." if record["source"] else "",
    ]
    return " ".join(word for word in words if word)


def settings_of(row: Row) -> dict:
    """What is not a setting's default."""
    defaults = {f.name: f.default for f in dataclasses.fields(row.settings)}
    return {k: v for k, v in dataclasses.asdict(row.settings).items() if v != defaults[k] and v not in ([], {})}


def _finite(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
