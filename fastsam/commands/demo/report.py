"""What the runs add up to: a table for the terminal and in Markdown, and a picture of the training curves."""

from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from fastsam.commands.demo.experiment import curvature_file
from fastsam.curvature import draw_panels

TITLE = "Digits: accuracy, sharpness, time"
HEADERS = (
    "model",
    "method",
    "test accuracy, %",
    "top Hessian eigenvalue",
    "loss rise, 1e-3",
    "train, s",
    "step, ms",
    "optim., %",
)

# Okabe and Ito's colours, told apart with any colour vision; dashes and widths help where lines overlap.
STYLES = {
    "SGD": ("#000000", "-", 2),
    "SAM": ("#E69F00", "-", 4),
    "F-SAM": ("#0072B2", "-.", 2),
    "Eigen-SAM": ("#009E73", (0, (1, 1)), 2.5),
    "MomentumSAM": ("#D55E00", "--", 2),
}


def rows(results: dict) -> list[tuple[str, ...]]:
    """One row for each model and method: mean ± sample standard deviation over seeds, medians of times."""
    return [_row(model, method, _select(results, model, method)) for model, method in _pairs(results)]


def caption(results: dict) -> str:
    """What the columns mean and how they were measured."""
    chosen, data = results["settings"], results["settings"]["data"]
    parameters = {run["model"]: run["parameters"] for run in results["runs"]}
    models = [
        f"{name}: {parameters[name]:,} parameters, {m['epochs']} epochs, batches of {m['batch_size']}, "
        f"lr {m['lr']}, weight decay {m['weight_decay']}, rho {m['rho']}"
        + (f" ({m['momentum_sam_rho']} for MomentumSAM)" if "momentum_sam_rho" in m else "")
        for name, m in chosen["models"].items()
    ]
    methods = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in options.items())
        for name, options in chosen["methods"].items()
        if options
    ]
    refresh_ms = [ms for run in results["runs"] for ms in run["eigenvector_ms"]]
    sentences = [
        f"Digits of scikit-learn: {data['train_size']} for training, {data['label_noise']:.0%} of them with "
        "a wrong label; the rest for testing, with right labels",
        f"Mean ± standard deviation over {_seeds(results)}; accuracy after the last epoch",
        "; ".join([*models, *methods]),
        "SGD with momentum under every method; settings from a short search with one seed on the same split",
        f"Sharpness is that of the training loss, in nats, on {data['sharpness_size']} fixed images at the "
        "final weights in eval mode: the Hessian's eigenvalue of largest magnitude, by Lanczos to a relative residual "
        f"of {chosen['sharpness_tolerance']}, and as loss rise L(w + e) - L(w) for e of length "
        f"{chosen['sharpness_rho']} along the gradient",
        "Times are medians: a step is its forward and backward passes and the optimizer, whose share "
        "(optim.) is all but the passes; train is the sum of a run's steps"
        + (f" and power iterations ({median(refresh_ms):.0f} ms each time)" if refresh_ms else ""),
        f"{_plural(chosen['runs_at_once'], 'run')} at once, each on one thread of "
        f"{results['machine']['processor']}; {results['seconds']:.0f} s for all",
    ]
    return ". ".join(sentences) + "."


def print_table(results: dict, console: Console, first: bool = False) -> None:
    """The table as rich draws it, with a rule between models, and its caption.

    The ``first`` table, of what is done while other runs go on, has a line for a caption.
    """
    body = rows(results)
    table = Table(title=TITLE, box=box.SIMPLE_HEAD, padding=0)
    for i, header in enumerate(HEADERS):
        # Values stay on one line, words of headers on one each, so that the table fits 80 columns.
        words = header.replace(" ", "\n")
        widest = max(len(row[i]) for row in body)
        table.add_column(words, justify="left" if i < 2 else "right", min_width=widest)
    for row, following in zip(body, [*body[1:], body[-1]], strict=True):
        table.add_row(*row, end_section=following[0] != row[0])
    console.print(table)
    said = f"After {results['seconds']:.0f} s; the other runs go on." if first else caption(results)
    console.print(said, style="dim", highlight=False)


def markdown_table(results: dict) -> str:
    """The same table and caption in Markdown."""
    lines = [HEADERS, tuple("---" if i < 2 else "---:" for i in range(len(HEADERS))), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption(results)}\n"


def draw(results: dict, path: Path) -> None:
    """Training loss and test accuracy by epoch, a row of axes for each model.

    Lines are means over seeds, bands go from the lowest to the highest seed.
    """
    models = list(results["settings"]["models"])
    figure = Figure(figsize=(11, 4 * len(models)), dpi=130, layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    for model, (loss_axes, accuracy_axes) in zip(models, axes, strict=True):
        for method in results["settings"]["methods"]:
            runs = _select(results, model, method)
            _curve(loss_axes, [run["train_loss"] for run in runs], method)
            _curve(accuracy_axes, [run["test_accuracy"] for run in runs], method)
        loss_axes.set(title=f"{model}: training loss", ylabel="cross-entropy, nats (noisy labels)", ylim=(0, None))
        accuracy_axes.set(title=f"{model}: test accuracy", ylabel="test images right")
        accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        highest = max(max(run["test_accuracy"]) for run in results["runs"])
        # The first epochs are near chance for every method: the room belongs to where they differ.
        if highest > 0.7:
            accuracy_axes.set_ylim(0.5, 1.0)
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        title=f"mean and range of {_seeds(results)}",
        frameon=False,
    )
    figure.savefig(path, metadata={"Software": "fastsam"})


def draw_curvature(results: dict, folder: Path, path: Path) -> None:
    """The two panels of the Eigen-SAM paper: alignment and top eigenvalue over training, with a 95 % band."""
    chosen = results["settings"]["curvature"]
    model = chosen["model"]
    seeds = {method: [run["seed"] for run in _select(results, model, method)] for method in chosen["methods"]}
    files = {m: [curvature_file(folder, model, m, seed) for seed in seeds[m]] for m in seeds if seeds[m]}
    draw_panels(files, path)


def _curve(ax, curves: list[list[float]], method: str) -> None:
    colour, dashes, width = STYLES[method]
    by_epoch = list(zip(*curves, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    ax.plot(
        epochs,
        [mean(values) for values in by_epoch],
        color=colour,
        linestyle=dashes,
        linewidth=width,
        label=method,
    )
    low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
    ax.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)


def _row(model: str, method: str, runs: list[dict]) -> tuple[str, ...]:
    return (
        model,
        method,
        _mean_and_std([100 * run["test_accuracy"][-1] for run in runs], 1),
        _mean_and_std([run["top_eigenvalue"] for run in runs], 1),
        _mean_and_std([1000 * run["loss_rise"] for run in runs], 1),
        f"{median(sum(run['step_ms']) + sum(run['eigenvector_ms']) for run in runs) / 1000:.1f}",
        f"{median(ms for run in runs for ms in run['step_ms']):.1f}",
        f"{median(_shares(runs)):.1f}",
    )


def _pairs(results: dict) -> list[tuple[str, str]]:
    return [(model, method) for model in results["settings"]["models"] for method in results["settings"]["methods"]]


def _select(results: dict, model: str, method: str) -> list[dict]:
    return [run for run in results["runs"] if (run["model"], run["method"]) == (model, method)]


def _shares(runs: list[dict]) -> list[float]:
    """The optimizer's percentage of each step."""
    return [100 * o / s for run in runs for o, s in zip(run["optimizer_ms"], run["step_ms"], strict=True)]


def _mean_and_std(values: list[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _seeds(results: dict) -> str:
    """How many seeds the runs have, by model where they differ."""
    counts = {model: len({r["seed"] for r in results["runs"] if r["model"] == model}) for model, _ in _pairs(results)}
    if len(set(counts.values())) == 1:
        return _plural(next(iter(counts.values())), "seed")
    return ", ".join(f"{_plural(count, 'seed')} ({model})" for model, count in counts.items())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
