"""What a run shows while it trains, and the table at its end; TensorBoard and Weights & Biases where asked."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def progress_bar(console: Console) -> Progress:
    """A bar for each task, which has a ``state``, a text, beside it; nothing where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
        expand=True,
        transient=True,
        speed_estimate_period=3600,  # one advance, such as a Hessian-vector product, may take minutes
    )


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
        text = f"loss {row['loss']:.4f}  {row['images_per_second']:,.0f} images/s  {_shares(row)}"
        self._bar.update(self._task, state=text)
        if row["test_accuracy"] is not None:
            self.say(f"epoch {row['epoch']:g}  step {row['step']}  accuracy {100 * row['test_accuracy']:.2f} %  {text}")

    def result(self, result: dict[str, Any]) -> None:
        table = Table("what", "value", title="Fine-tuned", title_justify="left", show_header=False)
        table.columns[1].overflow = "fold"
        for name, text in (
            ("model", f"{result['model']}, {result['parameters']:,} parameters"),
            ("data", f"{result['data']}, {result['train_images']:,} images, {result['test_images']:,} for testing"),
            ("method", f"{result['method']} over {result['optimizer']}"),
            ("test accuracy", f"{100 * result['test_accuracy']:.2f} %"),
            *_best(result),
            ("test loss", f"{result['test_loss']:.4f} nats"),
            ("steps", f"{result['steps']:,} in {result['seconds']:.1f} s"),
            ("images a second", f"{result['images_per_second']:,.0f}"),
            ("waiting for data", f"{100 * result['data_wait_share']:.2f} % of the training time"),
            ("memory", f"{result['memory_mib']:,.0f} MiB at most"),
            ("saved in", result["saved"]),
        ):
            table.add_row(name, text)
        self.console.print(table)


class Logs:
    """The TensorBoard and Weights & Biases runs that ``--log`` asks for."""

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any], step: int) -> None:
        self._board = self._wandb = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if "wandb" in names:
            import wandb

            identity = folder / "wandb-id"
            if not identity.exists():
                identity.write_text(wandb.util.generate_id())
            self._wandb = wandb.init(
                project="fastsam", dir=str(folder), id=identity.read_text(), resume="allow", config=config
            )

    def add(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if v is not None and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def memory_mib(device: torch.device) -> float:
    """The most memory used so far: on a GPU by torch's tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _best(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Nothing for a run that was finished by a version without ``best/``."""
    if "best_epoch" in result:
        yield "best, in best/", f"{100 * result['best_accuracy']:.2f} %, after epoch {result['best_epoch']}"


def _shares(row: dict[str, Any]) -> str:
    return f"{row['memory_mib']:,.0f} MiB  waiting for data {100 * row['data_wait_share']:.2f} %"
