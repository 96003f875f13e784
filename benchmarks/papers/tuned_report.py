"""What the finished runs of a table with a search add up to: JSON, Markdown, and pictures."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from benchmarks.frontier.report import half_interval
from benchmarks.papers.results import settings_of
from benchmarks.papers.tables import Row, split_name
from benchmarks.papers.tuned import PHASES, Tuned, lines
from benchmarks.papers.tuned_run import CURVE, numbers_of
from fastsam.curvature import draw_panels

HEADERS = (
    "method", "accuracy, %", "balanced, %", "over the base, points", "balanced, points", "gradients a step", "seconds",
    "numbers",
)  # fmt: skip


def summary(tuned: Tuned, rows: list[Row], machine: dict) -> dict:
    """Each line of rows whose base has all its seeds, with the rows that have all of theirs, and what has not run."""
    found, left = {}, {}
    for line, members in lines(rows).items():
        entries = {row.name: entry for row in members if (entry := _entry(tuned, row)) is not None}
        base = tuned.base(members[0])
        if base.name in entries:
            found[line] = {"base": base.name, "rows": _compared(list(entries.values()), entries[base.name])}
        left[line] = {
            row.name: [_finished(tuned, row), sum(tuned.count(row, phase) for phase in PHASES)]
            for row in members
            if row.name not in entries or base.name not in entries
        }
    table = tuned.table
    return {
        "table": table.name, "title": table.title, "note": table.note, "machine": machine, "lines": found,
        "unfinished": {line: rows for line, rows in left.items() if rows},
    }  # fmt: skip


def _finished(tuned: Tuned, row: Row) -> int:
    return sum(len(tuned.records.of(tuned.jobs(row, phase))) for phase in PHASES)


def _entry(tuned: Tuned, row: Row) -> dict | None:
    runs, chosen = tuned.records.of(tuned.jobs(row, "test")), tuned.chosen(row)
    if chosen is None or len(runs) < tuned.seeds(row):
        return None
    return {
        "name": row.name,
        "settings": settings_of(Row(row.name, chosen)),
        "numbers": numbers_of(chosen),
        "at_the_edge": tuned.at_the_edge(row),
        "numbers_of": row.numbers_of,
        "seeds": [run["seed"] for run in runs],
        "accuracy": [run["accuracy"] for run in runs],
        "balanced": [run["balanced"] for run in runs],
        "gradients": mean(run["gradients"] for run in runs),
        "seconds": mean(run["seconds"] for run in runs),
        "curves": [run["curve"] for run in runs if "curve" in run],
    }


def _compared(rows: list[dict], base: dict) -> list[dict]:
    """Adds what each row has over the base, seed by seed: mean and half its 95 % interval (Student's t)."""
    for row in rows:
        for metric in ("accuracy", "balanced"):
            row[f"{metric} over base"] = difference(row[metric], base[metric])
    return rows


def difference(ours: list[float], theirs: list[float]) -> list[float]:
    """[mean, half of its 95 % interval] of the differences of the same seeds."""
    found = [a - b for a, b in zip(ours, theirs, strict=True)]
    return [mean(found), half_interval(found)]


def told_apart(interval: list[float]) -> bool:
    """Whether 0 is outside the interval; never for a single seed, which has none."""
    centre, half = interval
    return abs(centre) > half


def markdown(record: dict) -> str:
    """A table for each line, what is not told apart in it, and what has not run."""
    parts = [f"{record['title']}. {record['note']}\n"]
    for line, found in record["lines"].items():
        rows = found["rows"]
        seeds = len(rows[0]["seeds"])
        if rows[0]["curves"]:
            parts.append(_curvature(line, rows))
            continue
        parts.append(f"**{line}** ({seeds} seed{'s' * (seeds > 1)})\n")
        parts.append("| " + " | ".join(HEADERS) + " |\n|---|" + "---:|" * (len(HEADERS) - 2) + "---|")
        parts += ["| " + " | ".join(_cells(row, row["name"] == found["base"])) + " |" for row in rows]
        parts.append("\n" + _sentences(rows, found["base"]) + "\n")
    if not record["lines"]:
        parts.append("No row has all its runs yet.\n")
    for line, unfinished in record["unfinished"].items():
        if not any(runs for runs, _ in unfinished.values()) and line not in record["lines"]:
            parts.append(f"Not run yet: {line}.\n")
            continue
        rows_left = (f"{_method(name)} ({runs} of {wanted} runs)" for name, (runs, wanted) in unfinished.items())
        parts.append(f"Not finished, {line}: {', '.join(rows_left)}.\n")
    if record["lines"]:
        parts.append(
            "± is the standard deviation over the seeds; differences are of the same seeds, with their 95 % interval "
            "by Student's t. Seconds are of one run's training, of one thread. Processor: "
            f"{record['machine']['cpu']}, {record['machine']['date'][:10]}.\n"
        )
    return "\n".join(parts)


def short(record: dict) -> str:
    """One table: methods down, networks across; of the lines whose rows have numbers of their own."""
    shown = {
        line: {_method(row["name"]): row for row in found["rows"]}
        for line, found in record["lines"].items()
        if not any(row["numbers_of"] or row["curves"] for row in found["rows"])
    }
    if not shown:
        return "Not run yet."
    bases = {_method(record["lines"][line]["base"]) for line in shown}
    parts = [f"| | gradients a step | {' | '.join(shown)} |", "|---|---:|" + "---:|" * len(shown)]
    for method in dict.fromkeys(method for rows in shown.values() for method in rows):
        found = [rows.get(method) for rows in shown.values()]
        gradients = mean(row["gradients"] for row in found if row is not None)
        cells = ("–" if row is None else _short_cell(row, method in bases) for row in found)
        parts.append(f"| {method} | {gradients:.2f} | {' | '.join(cells)} |")
    counts = {len(row["seeds"]) for rows in shown.values() for row in rows.values()}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    parts.append(
        f"\n{record['title']}: test accuracy in %, mean of {seeds} seeds; behind it what a method has over "
        f"{min(bases)}, in points, seed by seed, with its 95 % interval, in bold where that leaves out 0."
    )
    return "\n".join(parts)


def _short_cell(row: dict, is_base: bool) -> str:
    accuracy, interval = f"{100 * mean(row['accuracy']):.1f}", row["accuracy over base"]
    if is_base:
        return accuracy
    gain = _interval(interval)
    return f"{accuracy} ({f'**{gain}**' if told_apart(interval) else gain})"


def _cells(row: dict, is_base: bool) -> Iterable[str]:
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in row["numbers"].items())
    yield _method(row["name"])
    for metric in ("accuracy", "balanced"):
        spread = f" ± {100 * stdev(row[metric]):.1f}" if len(row[metric]) > 1 else ""
        yield f"{100 * mean(row[metric]):.1f}{spread}"
    for metric in ("accuracy", "balanced"):
        yield "" if is_base else _interval(row[f"{metric} over base"])
    yield f"{row['gradients']:.2f}"
    yield f"{row['seconds']:.0f}"
    yield numbers + (" (at the edge of what was tried)" if row["at_the_edge"] else "")


def _interval(interval: list[float]) -> str:
    return f"{100 * interval[0]:+.1f} ± {100 * interval[1]:.1f}"


def _sentences(rows: list[dict], base: str) -> str:
    """Which methods these seeds tell from the base, and which from the one with the highest accuracy."""
    others = [row for row in rows if row["name"] != base]
    if len(rows[0]["seeds"]) < 2:
        return "One seed tells no two methods apart."
    clear = {_method(r["name"]): r["accuracy over base"][0] for r in others if told_apart(r["accuracy over base"])}
    better, worse = [m for m, gain in clear.items() if gain > 0], [m for m, gain in clear.items() if gain < 0]
    same = [_method(r["name"]) for r in others if not told_apart(r["accuracy over base"])]
    best = max(rows, key=lambda r: mean(r["accuracy"]))
    as_good = [
        _method(r["name"])
        for r in rows
        if r is not best and not told_apart(difference(best["accuracy"], r["accuracy"]))
    ]
    words = [
        f"Above {_method(base)} by accuracy: {', '.join(better) or 'none'}.",
        f"Below it: {', '.join(worse)}." if worse else "",
        f"Not told apart from it (the interval contains 0): {', '.join(same)}." if same else "",
        f"Not told apart from the highest, {_method(best['name'])}: {', '.join(as_good) or 'none'}.",
    ]
    return " ".join(word for word in words if word)


def _curvature(line: str, rows: list[dict]) -> str:
    """The top eigenvalue and the alignment of the perturbation with its vector, at the end of training."""
    parts = [f"**{line}** ({len(rows[0]['seeds'])} seeds)\n"]
    parts.append("| method | top eigenvalue at the end | alignment, mean |\n|---|---:|---:|")
    for row in rows:
        last = mean(curve[-1][1] for curve in row["curves"])
        aligned = mean(point[2] for curve in row["curves"] for point in curve)
        parts.append(f"| {_method(row['name'])} | {last:.3g} | {aligned:.3f} |")
    return "\n".join(parts) + "\n"


def _method(name: str) -> str:
    return split_name(name)[1]


def draw(record: dict, folder: Path) -> list[Path]:
    """The differences from the base, and curvature over training; the pictures' files."""
    name, drawn = record["table"], []
    shown = {line: found for line, found in record["lines"].items() if not found["rows"][0]["curves"]}
    if shown:
        drawn.append(folder / f"{name}-differences.png")
        _draw_differences(shown, drawn[-1])
    for found in record["lines"].values():
        if found["rows"][0]["curves"]:
            drawn.append(folder / f"{name}-curvature.png")
            _draw_curvature(found["rows"], drawn[-1])
    return drawn


def _draw_differences(shown: dict, path: Path) -> None:
    """A panel for each line: accuracy over the base, with the 95 % interval; filled where it leaves out 0."""
    heights = [len(found["rows"]) - 1 + 2 for found in shown.values()]
    figure = Figure(figsize=(7, 0.32 * sum(heights) + 0.5), dpi=120, layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (line, found) in zip(panels, shown.items(), strict=True):
        rows = [row for row in found["rows"] if row["name"] != found["base"]][::-1]
        for place, row in enumerate(rows):
            centre, half = (100 * value for value in row["accuracy over base"])
            clear = told_apart(row["accuracy over base"])
            axes.errorbar(centre, place, xerr=half, fmt="o", markersize=5, color="#0072B2" if clear else "#777777",
                          markerfacecolor="#0072B2" if clear else "white")  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [_method(row["name"]) for row in rows], fontsize=8)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_title(f"{line}, over {_method(found['base'])}", fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("test accuracy over the base, points (95 % interval)")
    figure.savefig(path, metadata={"Software": "fastsam"})


def _draw_curvature(rows: list[dict], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[Path]] = {}
        for row in rows:
            for number, curve in enumerate(row["curves"]):
                file = Path(folder) / f"{len(runs)}-{number}.csv"
                runs.setdefault(_method(row["name"]), []).append(file)
                with file.open("w", newline="") as opened:
                    csv.writer(opened).writerows([CURVE, *([int(point[0]), *point[1:]] for point in curve)])
        draw_panels(runs, path)
