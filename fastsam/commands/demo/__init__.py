"""A demonstration on real data: SGD, SAM, F-SAM, Eigen-SAM and MomentumSAM on the handwritten digits of scikit-learn.

>>> from pathlib import Path
>>> from fastsam.commands import demo
>>> results = demo.run(Path("demo-results"))        # doctest: +SKIP
>>> print(demo.markdown_table(results))             # doctest: +SKIP
"""

import importlib.util
import json
from pathlib import Path

__all__ = ["markdown_table", "run"]

_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def run(output: Path, seeds: int | None = None, epochs: int | None = None, quick: bool = False) -> dict:
    """Train a small ResNet and a small vision transformer with five methods; compare them.

    Trains as many runs at once as there are processors, each on one thread, and shows progress. It prints a table as
    soon as the ResNet's runs are done and one of all at the end, and writes into the folder ``output``:
    ``report.html``, everything in one file; ``training_curves.png``; ``curvature.png``, the two panels of the Eigen-SAM
    paper, alignment and top eigenvalue over training, from the files in ``curvature``; ``results.json`` (every raw
    number, the settings and the machine) and ``table.md``.

    Args:
        output: folder for the results; made if it is not there.
        seeds: number of seeds, 0 to seeds - 1, instead of each model's own number; a seed fixes the initial weights
            and the order of the batches, alike for all methods.
        epochs: epochs of every run, instead of each model's own number.
        quick: one seed and a few steps in this process: tries every line in seconds, learns nothing.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: ``seeds`` or ``epochs`` below 1.
        ImportError: a package the demo needs is missing; the message names it.
        OSError: ``output`` cannot be written to.

    Runs start in fresh processes, so a script that calls this needs ``if __name__ == "__main__":``.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    _check_packages()

    from rich.console import Console

    from fastsam.commands.demo import experiment, report
    from fastsam.commands.page import writable_folder, write_page

    output = writable_folder(Path(output))
    console = Console()
    results = experiment.run(
        console,
        seeds,
        epochs,
        quick,
        output / "curvature",
        lambda first: report.print_table(first, console, first=True),
    )

    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "table.md").write_text(report.markdown_table(results))
    report.draw(results, output / "training_curves.png")
    pictures = [output / "training_curves.png"]
    if any(run["curvature"] for run in results["runs"]):
        report.draw_curvature(results, output / "curvature", output / "curvature.png")
        pictures.append(output / "curvature.png")
    page = write_page(output / "report.html", report.TITLE, report.markdown_table(results), pictures)
    report.print_table(results, console)
    for path in (page, *pictures, output / "results.json", output / "table.md"):
        console.print(f"wrote {path.resolve()}", highlight=False, soft_wrap=True)
    return results


def markdown_table(results: dict) -> str:
    """The table in Markdown with its caption; ``results`` as :func:`run` returns or writes them."""
    from fastsam.commands.demo import report

    return report.markdown_table(results)


def _check_packages() -> None:
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'fastsam-optim[demo]'")
