"""A demonstration on real data: SGD, SAM, F-SAM and Eigen-SAM on the handwritten digits of scikit-learn.

>>> from pathlib import Path
>>> from fastsam import demo
>>> results = demo.run(Path("demo-results"))        # doctest: +SKIP
>>> print(demo.markdown_table(results))             # doctest: +SKIP
"""

import importlib.util
import json
from pathlib import Path

__all__ = ["markdown_table", "run"]

_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def run(output: Path, seeds: int = 3, epochs: int | None = None, quick: bool = False) -> dict:
    """Train a small vision transformer and a small ResNet with four methods and several seeds; compare them.

    Trains as many runs at once as there are processors, each on one thread, and shows progress. At the end it
    prints a table and writes into the folder ``output``: ``training_curves.png``; ``curvature.png``, the two panels of
    the Eigen-SAM paper, alignment and top eigenvalue over training, from the files in ``curvature``; ``results.json``
    (every raw number, the settings and the machine) and ``table.md``.

    Args:
        output: folder for the results; made if it is not there.
        seeds: number of seeds, 0 to seeds - 1; each fixes the initial weights and the order of the batches,
            alike for all methods.
        epochs: epochs of every run, instead of each model's own number.
        quick: one seed and a few steps in this process: tries every line in seconds, learns nothing.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: ``seeds`` or ``epochs`` below 1.
        ImportError: a package the demo needs is missing; the message names it.

    Runs start in fresh processes, so a script that calls this needs ``if __name__ == "__main__":``.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    _check_packages()

    from rich.console import Console

    from . import experiment, report

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = experiment.run(console, 1 if quick else seeds, epochs, quick, output / "curvature")

    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "table.md").write_text(report.markdown_table(results))
    report.draw(results, output / "training_curves.png")
    written = ["training_curves.png", "results.json", "table.md"]
    if any(run["curvature"] for run in results["runs"]):
        report.draw_curvature(results, output / "curvature", output / "curvature.png")
        written.insert(1, "curvature.png")
    report.print_table(results, console)
    for name in written:
        console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)
    return results


def markdown_table(results: dict) -> str:
    """The table in Markdown with its caption; ``results`` as :func:`run` returns or writes them."""
    from . import report

    return report.markdown_table(results)


def _check_packages() -> None:
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'fastsam[demo]'")
