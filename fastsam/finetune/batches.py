"""Batches of uint8 images in an order that the seed, the epoch and the step decide, from memory or from workers.

Where every image fits into a quarter of the free memory they are decoded once and kept on the training device; else
processes decode them again each epoch, ahead of the model. Both give the same batches.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fastsam.memory import free_memory
from fastsam.training.data import DataError, open_image

Batch = tuple[Tensor, Tensor]
SHARE_OF_MEMORY = 0.25


def seed_of(*parts: int | str) -> int:
    """A seed for torch from what it is for, such as (seed, "order", epoch): unlike seeds for unlike purposes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of ``count`` images in an epoch, int64; a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))


def remaining(count: int, size: int, seed: int, step: int, steps: int) -> Iterator[Tensor]:
    """The images of each step from ``step`` on; an epoch has whole batches only, and leaves out what is left."""
    per_epoch, order, of = count // size, None, None
    for epoch, within in (divmod(s, per_epoch) for s in range(step, steps)):
        if epoch != of:
            order, of = shuffled(count, seed, epoch), epoch
        yield order[within * size : (within + 1) * size]


def open_images(
    dataset,
    labels: Tensor,
    prepare: Callable,
    device: torch.device,
    workers: int | None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> InMemory | Streamed:
    """The images of a ``datasets.Dataset`` as ``prepare`` makes them, with these labels, int64 of shape (N,).

    ``progress`` wraps the iteration that decodes them into memory. Raises ``DataError`` for an image that does not
    open, ``ValueError`` if they do not all become one size.
    """
    images = _Decoded(dataset, labels, prepare)
    streamed = Streamed(images, device, min(8, os.cpu_count() or 1) if workers is None else workers)
    first, _ = next(iter(Streamed(images, device, 0).on_host([torch.tensor([0])])))
    if first.numel() * len(labels) > SHARE_OF_MEMORY * _free_memory(device):
        return streamed
    kept = torch.empty((len(labels), *first.shape[1:]), dtype=torch.uint8)
    filled = 0
    # Starting processes takes longer than decoding a few thousand small images here.
    decoding = streamed if first.numel() * len(labels) > 64e6 else Streamed(images, device, 0)
    parts = torch.arange(len(labels)).split(256)
    for part, _ in progress(decoding.on_host(parts), len(parts)):
        kept[filled : filled + len(part)] = part
        filled += len(part)
    return InMemory(kept.to(device), labels.to(device))


class InMemory:
    """Images (N, C, H, W) in uint8 and labels (N,) on one device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each tensor of ``indices``."""
        for chosen in indices:
            chosen = chosen.to(self.images.device)
            yield self.images[chosen], self.labels[chosen]


class Streamed:
    """Images that worker processes decode ahead of their use, in this one if there are none."""

    def __init__(self, images: _Decoded, device: torch.device, workers: int) -> None:
        self.images, self.device, self.workers = images, device, workers

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """As :meth:`InMemory.batches`, copied to the device while the model is at work."""
        for images, labels in self.on_host(indices, pin=self.device.type == "cuda"):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def on_host(self, indices: Iterable[Tensor], pin: bool = False) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            self.images,
            batch_sampler=(chosen.tolist() for chosen in indices),
            num_workers=self.workers,
            pin_memory=pin,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(0),  # or it would draw from the global one
            collate_fn=_stacked,
        )
        try:
            for batch in loader:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that decodes images ended ({error}): say --workers 0, or fewer") from error


class _Decoded(torch.utils.data.Dataset):
    def __init__(self, dataset, labels: Tensor, prepare: Callable) -> None:
        self._dataset, self._labels, self._prepare = dataset, labels, prepare

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Batch | Exception:
        # Returned, not raised: a worker's exception reaches the parent with a traceback for a message.
        try:
            return self._prepare(open_image(self._dataset, index)), self._labels[index]
        except (ValueError, OSError) as error:
            return error


def _stacked(items: list[Batch | Exception]) -> Batch | Exception:
    failed = next((item for item in items if isinstance(item, Exception)), None)
    if failed is not None:
        return failed
    images = [image for image, _ in items]
    if len({image.shape for image in images}) > 1:
        return ValueError(
            f"the model's image processor keeps the shape of images: they become {tuple(images[0].shape[1:])} and "
            "others. Give its preprocessor_config.json a size with height and width, or scale the images to one size"
        )
    return torch.stack(images), torch.stack([label for _, label in items])


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _free_memory(device: torch.device) -> float:
    """Bytes that are free on this machine, in its container and on the device, whichever are fewest."""
    free = (free_memory(torch.device("cpu")), free_memory(device))
    return min((each for each in free if each is not None), default=float("inf"))
