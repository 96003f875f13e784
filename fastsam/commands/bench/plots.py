"""The pictures of the throughput report: bars by method, and cost against parameters and against tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastsam.commands.bench.settings import METHODS
from fastsam.commands.bench.tables import BASE_TITLES, COLUMNS

# Okabe and Ito's colours, told apart with any colour vision; the markers tell the lines apart in grey.
_COLOURS = {
    "fastsam": "#0072B2",
    "fastsam-flat": "#56B4E9",
    "fastsam-triton": "#004B75",
    "fastsam-graph": "#009E73",
    "fastsam-triton-graph": "#006B4F",
    "authors": "#D55E00",
    "foreach": "#E69F00",
    "foreach-fused": "#F0E442",
    "compiled": "#CC79A7",
    "pytorch_optimizer": "#999999",
    "plain": "#000000",
}
_MARKERS = dict(zip(_COLOURS, "osdDh^vP*X.", strict=True))
_DPI = 110


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures for which the result has rows into ``folder``; their paths."""
    made = []
    for name, figure in (
        ("methods.png", _optimizer_bars(result["optimizer"])),
        ("training.png", _training_bars(result["training"])),
        ("parameters.png", _cost(result, "parameters")),
        ("tensors.png", _cost(result, "tensors")),
    ):
        if figure is not None:
            figure.savefig(folder / name, dpi=_DPI, metadata={"Software": "fastsam"})
            made.append(folder / name)
    return made


def _optimizer_bars(rows: list[dict[str, Any]]) -> Figure | None:
    """A panel for each model, base and dtype; groups of bars by method, milliseconds of a step."""
    panels = _panels(rows, ("title", "base", "dtype"))
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for place, ((title, base, dtype), of_panel) in zip(axes, panels.items(), strict=True):
        _bars(place, of_panel, "ms", [METHODS[m] for m in _methods(of_panel)], _methods(of_panel))
        place.set(title=f"{title}, {BASE_TITLES[base]}, {dtype}", ylabel="optimizer step, ms")
    _legend(figure, rows)
    return figure


def _training_bars(rows: list[dict[str, Any]]) -> Figure | None:
    """A panel for each network, base, dtype and batch; images a second by method."""
    panels = _panels(rows, ("title", "base", "dtype", "batch"))
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for place, ((title, base, dtype, batch), of_panel) in zip(axes, panels.items(), strict=True):
        methods = _methods(of_panel)
        names = [f"{BASE_TITLES[base]} alone" if method == "plain" else METHODS[method] for method in methods]
        _bars(place, of_panel, "images_per_s", names, methods)
        place.set(title=f"{title}, {dtype}, batch {batch}", ylabel="images a second")
    _legend(figure, rows)
    return figure


def _cost(result: dict[str, Any], curve: str) -> Figure | None:
    """Milliseconds against parameters, or tensors, both logarithmic, with the quartiles and the lines through them."""
    rows = [row for row in result[curve] if row["ms"] is not None]
    if not rows:
        return None
    figure = Figure(figsize=(7, 5), layout="constrained")
    place = figure.subplots()
    for name in _implementations(rows):
        of_name = [row for row in rows if row["implementation"] == name]
        xs = [row[curve] for row in of_name]
        below = [row["ms"] - row["q1_ms"] for row in of_name]
        above = [row["q3_ms"] - row["ms"] for row in of_name]
        style: dict[str, Any] = {"color": _COLOURS[name], "marker": _MARKERS[name], "linestyle": "none", "capsize": 2}
        place.errorbar(
            xs, [row["ms"] for row in of_name], [[max(0, b) for b in below], [max(0, a) for a in above]],
            label=COLUMNS[name], **style,
        )  # fmt: skip
        for line in result["lines"]:
            if (line["curve"], line["implementation"]) == (curve, name):
                low, high = min(xs), max(xs)
                grid = [low * (high / low) ** (k / 60) for k in range(61)]
                place.plot(
                    grid, [line["fixed_ms"] + line["slope_ns"] / 1e6 * x for x in grid],
                    color=_COLOURS[name], linewidth=1, alpha=0.7,
                )  # fmt: skip
    first = rows[0]
    shared = f"{first['tensors']} tensors" if curve == "parameters" else f"{first['parameters']:,} parameters"
    place.set(
        xscale="log", yscale="log", xlabel=curve, ylabel="optimizer step, ms",
        title=f"{METHODS[first['method']]} over {BASE_TITLES[first['base']]}, {first['dtype']}, {shared}; "
        "lines: fixed + slope × x",
    )  # fmt: skip
    _tidy(place)
    place.grid(which="major", alpha=0.25)
    place.legend(frameon=False)
    return figure


def _bars(place: Axes, rows: list[dict[str, Any]], value: str, titles: list[str], methods: list[str]) -> None:
    """Bars of the value with its quartiles, a group for each method."""
    for group, method in enumerate(methods):
        of_group = {r["implementation"]: r for r in rows if r["method"] == method and r["ms"] is not None}
        names = _implementations(list(of_group.values()))
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            row = of_group[name]
            height = row[value]
            # Images a second are largest where the time is smallest.
            ends = [height * row["ms"] / row[q] if value != "ms" else row[q] for q in ("q1_ms", "q3_ms")]
            low, high = max(0, height - min(ends)), max(0, max(ends) - height)
            x = group + (i - (len(names) - 1) / 2) * width
            place.bar(x, height, width, color=_COLOURS[name])
            place.errorbar(x, height, [[low], [high]], color="black", linewidth=0.8)
    place.set_xticks(range(len(titles)), titles)
    _tidy(place)


def _panels(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[tuple, list[dict[str, Any]]]:
    """The rows of equal keys, of which at least one was measured."""
    panels: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ms"] is not None:
            panels.setdefault(tuple(row[key] for key in keys), []).append(row)
    return panels


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _implementations(rows: list[dict[str, Any]]) -> list[str]:
    found = {row["implementation"] for row in rows if row["ms"] is not None}
    return [name for name in _COLOURS if name in found]


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def _legend(figure: Figure, rows: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    names = _implementations(rows)
    handles = [Patch(color=_COLOURS[name], label=COLUMNS.get(name, "base optimizer alone")) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)


def _tidy(place: Axes) -> None:
    place.spines[["top", "right"]].set_visible(False)
