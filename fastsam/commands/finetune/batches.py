"""The images of a run as the Trainer's data sets, and which of them a process gets in each step.

Where every image fits into a quarter of the free memory they are decoded once and kept on the training device; else
processes decode them again each epoch, ahead of the model. Both give the same batches.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.commands.training.batches import shuffled
from fastsam.commands.training.data import open_image
from fastsam.support.memory import free_memory

SHARE_OF_MEMORY = 0.25


class Images(Dataset):
    """The images of a ``datasets.Dataset`` as ``prepare`` makes them, uint8 of shape (C, H, W), with these labels.

    ``dataset.__getitems__(indices)`` is a whole batch. ``progress`` wraps the iteration that decodes all images into
    memory, where they fit. Raises ``DataError`` for an image that does not open, ``ValueError`` if they do not all
    become one size.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor,
        prepare: Callable[[Any], Tensor],
        device: torch.device,
        workers: int | None,
        progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
    ) -> None:
        self._dataset, self._prepare, self._kept = dataset, prepare, None
        self.labels = labels
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        first = self.__getitems__([0])["pixel_values"]
        room = SHARE_OF_MEMORY * _free_memory(device) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if first.numel() * len(labels) > room:
            return
        kept = torch.empty((len(labels), *first.shape[1:]), dtype=torch.uint8)
        # Starting processes takes longer than decoding a few thousand small images here.
        workers = self.workers if first.numel() * len(labels) > 64e6 else 0
        parts = [list(range(i, min(i + 256, len(labels)))) for i in range(0, len(labels), 256)]
        for part, batch in progress(zip(parts, loader(self, parts, workers), strict=True), len(parts)):
            kept[part] = batch["pixel_values"]
        self.labels = labels.to(device)
        self._kept = kept.to(device)

    @property
    def in_memory(self) -> bool:
        return self._kept is not None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(indices, device=self.labels.device)
        if self._kept is not None:
            return {"pixel_values": self._kept[chosen], "labels": self.labels[chosen]}
        images = [self._prepare(open_image(self._dataset, index)) for index in indices]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the model's image processor keeps the shape of images: they become {tuple(images[0].shape[1:])} and "
                "others. Give its preprocessor_config.json a size with height and width, or scale the images to one "
                "size"
            )
        return {"pixel_values": torch.stack(images), "labels": self.labels[chosen]}


class Order:
    """A batch sampler: the images of one process in each micro-batch of an epoch, which the seed and the step decide.

    A step has ``size`` images. Each process takes an equal part of them in ``accumulate`` micro-batches; ``step()``
    is the number of steps that the run has behind it.
    """

    def __init__(
        self, count: int, size: int, seed: int, accumulate: int, rank: int, ranks: int, step: Callable[[], int]
    ) -> None:
        self._count, self._size, self._seed, self._step = count, size, seed, step
        self._accumulate, self._rank, self._ranks = accumulate, rank, ranks
        self._steps = count // size

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first = self._step() // self._steps * self._steps
        mine = self._size // self._ranks
        size = mine // self._accumulate
        for step in islice(shuffled(self._count, self._size, self._seed, first), self._steps):
            own = step.tolist()[self._rank * mine : (self._rank + 1) * mine]
            yield from (own[start : start + size] for start in range(0, mine, size))


def loader(images: Images, batches: Any, workers: int, pin: bool = False) -> DataLoader:
    """The batches of these lists of indices, decoded ahead by so many processes."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator().manual_seed(0),  # or it would draw from the global one
        collate_fn=as_it_is,
    )


def as_it_is(batch: Any) -> Any:
    """What collates a batch that is whole already."""
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _free_memory(device: torch.device) -> float:
    """Bytes that are free on this machine, in its container and on the device, whichever are fewest."""
    free = (free_memory(torch.device("cpu")), free_memory(device))
    return min((each for each in free if each is not None), default=float("inf"))
