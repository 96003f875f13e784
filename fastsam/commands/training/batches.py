"""Batches in a fresh order each epoch, which the seed and the step decide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastsam.commands.training.augment import cutout, random_crop, random_flip
from fastsam.commands.training.data import ImageSet

Batch = tuple[Tensor, Tensor]


def seed_of(*parts: int | str) -> int:
    """A seed for torch from what it is for, such as (seed, "order"): unlike seeds for unlike purposes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def shuffled(count: int, size: int, seed: int, step: int = 0, *, drop_last: bool = True) -> Iterator[Tensor]:
    """The images of each step from ``step`` on, without an end: indices, int64, ``size`` of them.

    An epoch is all ``count`` images in one random order, cut into batches. What is left over is a smaller batch, or
    none with ``drop_last``. The order of an epoch depends on ``count``, ``seed`` and the epoch alone, so that a run
    goes on at any step as if it had not stopped.
    """
    per_epoch = steps_per_epoch(count, size, drop_last)
    epoch, within = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        torch.randperm(count, generator=generator)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[within:per_epoch]
        within = 0


def steps_per_epoch(count: int, size: int, drop_last: bool = True) -> int:
    """Raises ``ValueError`` where that is none."""
    steps = count // size if drop_last else -(-count // size)
    if steps == 0:
        raise ValueError(f"batch_size={size} with drop_last for {count} images: no whole batch")
    return steps


class Batches:
    """Images for training and testing in the memory of one device, and their batches.

    Args:
        train, test: the images as they are kept.
        size: images in a batch.
        seed: of the order and of augmentation.
        drop_last: leave out the smaller batch at the end of an epoch.
        flip, crop, cutout: augmentation, see :mod:`fastsam.commands.training.augment`.
        prepare: makes the network's inputs of images as they are kept. It comes after flip and crop and before cutout,
            whose square is 0 in the network's inputs.

    Raises ``ValueError`` where there is no whole batch.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        size: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        drop_last: bool = True,
        flip: bool = False,
        crop: int = 0,
        cutout: int = 0,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:
        self._train, self._test, self._prepare = train.to(device), test.to(device), prepare
        self._size, self._seed, self._drop_last = size, seed, drop_last
        self._flip, self._crop, self._cutout = flip, crop, cutout
        self.steps_per_epoch = steps_per_epoch(len(train), size, drop_last)
        self._augmentation = torch.Generator(device).manual_seed(seed)
        self._go_to(0)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self._train.classes)

    def __len__(self) -> int:
        """Images for training."""
        return len(self._train)

    def epoch(self) -> Iterator[Batch]:
        """The next epoch's batches, in a fresh order and augmented."""
        for chosen in islice(self._indices, self.steps_per_epoch):
            images, labels = self._train[chosen.to(self._train.labels.device)].pair()
            if self._flip:
                images = random_flip(images, self._augmentation)
            if self._crop:
                images = random_crop(images, self._crop, self._augmentation)
            images = self._prepare(images)
            if self._cutout:
                images = cutout(images, self._cutout, self._augmentation)
            yield images, labels
        self._epoch += 1

    def test(self) -> Iterator[Batch]:
        return self._plain(self._test)

    def whole(self) -> Iterator[Batch]:
        """The training set in order, without augmentation."""
        return self._plain(self._train)

    def sample(self, count: int) -> Batch:
        """The first ``count`` images for training, without augmentation, and their labels."""
        images, labels = self._train[:count].pair()
        return self._prepare(images), labels

    def state_dict(self) -> dict[str, Any]:
        """Between epochs."""
        return {"epoch": self._epoch, "augmentation": self._augmentation.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._augmentation.set_state(state["augmentation"])
        self._go_to(state["epoch"])

    def _go_to(self, epoch: int) -> None:
        self._epoch = epoch
        step = epoch * self.steps_per_epoch
        self._indices = shuffled(len(self._train), self._size, self._seed, step, drop_last=self._drop_last)

    def _plain(self, images: ImageSet) -> Iterator[Batch]:
        size = max(self._size, 256)
        for x, y in zip(images.images.split(size), images.labels.split(size), strict=True):
            yield self._prepare(x), y
