"""What the runs add up to: JSON, a table in Markdown, and a picture of accuracy against price."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox
from scipy.stats import t

from benchmarks.frontier.protocol import Plan, Records, Search
from benchmarks.frontier.table import BASE, Row

#: What is asked of the cheap methods: (highest price, share of the best two-gradient method's gain over SGD).
ASKED = ((1.15, 0.95), (1.35, 1.0))
#: Rows further below the base than this are named under the picture and not drawn.
_BELOW = 0.03
HEADERS = ("gradients a step", "measured price", "test accuracy, %", "over SGD, points", "share of the gain", "numbers")


def summary(plan: Plan, records: Records) -> dict:
    """For each network its rows, in the table's order, and whether what is asked of them is reached."""
    found = {}
    for network in plan.networks:
        rows = [
            entry for row in plan.rows if (entry := _entry(Search(plan, records, network, row), records)) is not None
        ]
        found[network] = {"rows": rows, **_compared(rows)}
    return found


def unfinished(plan: Plan, networks: dict) -> dict[str, str]:
    """The rows that a network's summary lacks, and why."""
    found = {}
    for network, summed in networks.items():
        there = {entry["name"] for entry in summed["rows"]}
        left = [row.name for row in plan.rows if row.name not in there]
        if left:
            found[f"on the {network}: {', '.join(left)}"] = "not all of their runs are finished"
    return found


def _entry(search: Search, records: Records) -> dict | None:
    """A row's numbers; None where a run is missing."""
    runs, chosen = records.of(search.jobs("test")), search.chosen()
    if chosen is None or len(runs) < search.plan.seeds:
        return None
    runs.sort(key=lambda r: r["seed"])
    own = {k: v for k, v in chosen["numbers"].items() if search.row.method is not None or k != "rho"}
    return {
        "name": search.row.name,
        "numbers": own,
        "options": search.row.options,
        "at_the_edge": search.at_the_edge(),
        "validation_accuracy": chosen["accuracy"],
        "test_accuracies": [r["accuracy"] for r in runs],
        "test_accuracy": mean(r["accuracy"] for r in runs),
        "half_interval": half_interval([r["accuracy"] for r in runs]),
        "test_loss": mean(math.nan if r["loss"] is None else r["loss"] for r in runs),
        "gradients": mean(r["gradients"] for r in runs),
        "price": median(r["price"] for r in runs),
        "prices": [r["price"] for r in runs],
    }


def half_interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; nan for a single value."""
    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _compared(rows: list[dict]) -> dict:
    """Adds to each row its gain over SGD, seed by seed; says which rows reach what is asked.

    Which method stands for a price is chosen by validation accuracy, never by the test's.
    """
    base = next((row for row in rows if row["name"] == BASE.name), None)
    if base is None:
        return {"asked": []}
    for row in rows:
        gains = [a - b for a, b in zip(row["test_accuracies"], base["test_accuracies"], strict=True)]
        row["gain"], row["gain_half_interval"] = mean(gains), half_interval(gains)
    best = _by_validation(row for row in rows if row["gradients"] > 1.95)
    for row in rows:
        row["share"] = row["gain"] / best["gain"] if best and best["gain"] > 0 else None
    asked = []
    for price, share in ASKED:
        cheap = _by_validation(row for row in rows if row["price"] <= price and row is not base)
        asked.append({
            "price": price, "share": share, "method": cheap and cheap["name"], "found": cheap and cheap["share"],
            "reached": bool(cheap and cheap["share"] is not None and cheap["share"] >= share),
        })  # fmt: skip
    return {"best_of_two_gradients": best and best["name"], "asked": asked}


def _by_validation(rows) -> dict | None:
    return max(rows, key=lambda row: row["validation_accuracy"], default=None)


def markdown(results: dict) -> str:
    """A table for each network, cheapest rows first, and what was not run."""
    lines = []
    for network, found in results["networks"].items():
        lines += [f"**{network}**", "", "| method | " + " | ".join(HEADERS) + " |", "|---|" + "---:|" * 5 + "---|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in sorted(found["rows"], key=lambda r: r["price"])]
        lines += ["", *(f"{_sentence(asked)}" for asked in found["asked"]), ""]
    seeds = results["settings"]["seeds"]
    lines.append(
        f"Mean and 95 % interval over {seeds} seeds on the test set; numbers chosen on the validation set, with the "
        f"same number of runs for every row. Price: time of a step over that of plain SGD's in the same process, "
        f"median over the seeds. Processor: {results['machine']['cpu']}."
    )
    lines += [f"Not run: {name} ({reason})." for name, reason in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> tuple[str, ...]:
    numbers = {**row["numbers"], **row["options"]}
    return (
        row["name"],
        f"{row['gradients']:.2f}",
        f"{row['price']:.2f}",
        f"{100 * row['test_accuracy']:.1f} ± {100 * row['half_interval']:.1f}",
        f"{100 * row['gain']:+.1f} ± {100 * row['gain_half_interval']:.1f}",
        "" if row["share"] is None else f"{row['share']:.0%}",
        ", ".join(f"{k} {v:.3g}" for k, v in numbers.items()) + (" (at the grid's edge)" if row["at_the_edge"] else ""),
    )


def _sentence(asked: dict) -> str:
    if asked["method"] is None:
        return f"No method at a price of at most {asked['price']}."
    share = "no gain to compare with" if asked["found"] is None else f"{asked['found']:.0%} of the gain"
    return f"At a price of at most {asked['price']}: {asked['method']}, {share} ({asked['share']:.0%} asked)."


def draw(results: dict, path: Path) -> None:
    """Accuracy against price, a panel for each network; bars are 95 % intervals, the line is what nothing beats."""
    networks = results["networks"]
    figure = Figure(figsize=(7.5 * len(networks), 5.6), dpi=120, layout="constrained")
    panels: list[tuple[Axes, list[dict], int]] = []
    for axes, (network, found) in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks.items(), strict=True
    ):
        best = undominated(found["rows"])
        base = next(row["test_accuracy"] for row in found["rows"] if row["name"] == BASE.name)
        shown = [row for row in found["rows"] if row["test_accuracy"] > base - _BELOW]
        for row in shown:
            leads = row in best
            axes.errorbar(row["price"], row["test_accuracy"], row["half_interval"], fmt="o", markersize=5, elinewidth=1,
                          color="#0072B2" if leads else "#999999", zorder=3 if leads else 2)  # fmt: skip
        worse = [f"{row['name']} {row['test_accuracy']:.1%}" for row in found["rows"] if row not in shown]
        if worse:
            axes.text(0.01, 0.01, "below: " + ", ".join(worse), transform=axes.transAxes, fontsize=7, color="#777777")
        axes.plot([r["price"] for r in best], [r["test_accuracy"] for r in best], color="#0072B2", alpha=0.4, zorder=1)
        axes.set(title=network, xlabel="time of a step, in plain SGD steps", ylabel="test images right")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.15)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        panels.append((axes, [*best, *(row for row in shown if row not in best)], len(best)))
    figure.draw_without_rendering()
    for axes, rows, leading in panels:
        _name(axes, rows, leading)
    figure.savefig(path, metadata={"Software": "fastsam"})


def _name(axes: Axes, rows: list[dict], leading: int) -> None:
    """Writes the rows' names beside their points, the first ``leading`` in black, each where no other stands."""
    taken: list[Bbox] = []
    for i, row in enumerate(rows):
        for across, up in ((5, 4), (5, -10), (5, 16), (5, -22)):
            label = axes.annotate(
                row["name"], (row["price"], row["test_accuracy"]), xytext=(across, up), textcoords="offset points",
                fontsize=8 if i < leading else 6.5, color="black" if i < leading else "#777777",
            )  # fmt: skip
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def undominated(rows: list[dict]) -> list[dict]:
    """Rows that no cheaper one equals in accuracy, cheapest first."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda r: (r["price"], -r["test_accuracy"])):
        if not best or row["test_accuracy"] > best[-1]["test_accuracy"]:
            best.append(row)
    return best


def skipped(rows: tuple[Row, ...]) -> dict[str, str]:
    """The rows that cannot run, and why."""
    return {row.name: reason for row in rows if (reason := row.missing()) is not None}
