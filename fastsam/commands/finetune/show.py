"""What a run shows while it trains, and the table at its end."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastsam.commands.training.show import progress_bar


class Show:
    """``with Show(...) as show``: a progress bar on a terminal; a line for each epoch everywhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar = progress_bar(self.console)

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def decoding(self, items: Iterable, count: int) -> Iterable:
        """Passes ``count`` items on, with a bar of its own."""
        task = self._bar.add_task("decoding images", total=count, state="")
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def training(self, step: int, steps: int) -> None:
        self._task = self._bar.add_task("training", total=steps, completed=step, state="")

    def stepped(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def measured(self, row: dict[str, Any]) -> None:
        """The state beside the bar, and a line for an epoch that is complete."""
        text = (
            f"loss {row['loss']:.4f}  {row['images_per_second']:,.0f} images/s  {row['memory_mib']:,.0f} MiB  waiting "
            f"for data {100 * row['data_wait_share']:.2f} %"
        )
        self._bar.update(self._task, state=text)
        if row["test_accuracy"] is not None:
            self.say(f"epoch {row['epoch']:g}  step {row['step']}  accuracy {100 * row['test_accuracy']:.2f} %  {text}")

    def result(self, result: dict[str, Any]) -> None:
        table = Table("what", "value", title="Fine-tuned", title_justify="left", show_header=False)
        table.columns[1].overflow = "fold"
        for line in lines(result):
            table.add_row(*line)
        self.console.print(table)


def lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of a finished run, from what ``result.json`` holds: (what, value)."""
    best = f"{100 * result['best_accuracy']:.2f} %, after epoch {result['best_epoch']}"
    return [
        ("model", f"{result['model']}, {result['parameters']:,} parameters"),
        ("data", f"{result['data']}, {result['train_images']:,} images, {result['test_images']:,} for testing"),
        ("method", f"{result['method']} over {result['optimizer']}"),
        ("test accuracy", f"{100 * result['test_accuracy']:.2f} %"),
        ("best, in best/", best),
        ("test loss", f"{result['test_loss']:.4f} nats"),
        ("steps", f"{result['steps']:,} in {result['seconds']:.1f} s"),
        ("images a second", f"{result['images_per_second']:,.0f}"),
        ("waiting for data", f"{100 * result['data_wait_share']:.2f} % of the training time"),
        ("memory", f"{result['memory_mib']:,.0f} MiB at most"),
        ("saved in", result["saved"]),
    ]


def memory_mib(device: torch.device) -> float:
    """The most memory used so far: on a GPU by torch's tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
