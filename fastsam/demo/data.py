"""Handwritten digits that scikit-learn ships: 1797 grey images of 8 x 8 pixels, 10 classes."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .settings import DataSettings


@dataclass(frozen=True)
class Digits:
    """A fixed split. Images are float32 of shape (N, 1, 8, 8), standardised by the training set's mean and
    standard deviation; labels are int64 of shape (N,). Only training labels carry noise."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    sharpness_size: int

    def sharpness_subset(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """The training images and (noisy) labels on which sharpness is measured: always the same.

        ``size`` of them, by default ``sharpness_size``.
        """
        size = self.sharpness_size if size is None else size
        return self.train_images[:size], self.train_labels[:size]


@cache
def load(settings: DataSettings) -> Digits:
    """Split the digits by ``settings.split_seed`` and give a share of the training labels another class."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(settings.split_seed)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[: settings.train_size], order[settings.train_size :]

    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return Digits(
        train_images=images[train],
        train_labels=_with_noise(labels[train], settings.label_noise, generator),
        test_images=images[test],
        test_labels=labels[test],
        sharpness_size=settings.sharpness_size,
    )


def _with_noise(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Move exactly ``share`` of the labels to one of the nine other classes, each equally likely."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] = (noisy[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
    return noisy
