"""What the frontier's methods train: the demo's networks on digits, or three networks on photographs of solar cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor, nn

from fastsam.commands.training.data import noisy_digits
from fastsam.commands.training.elpv import VALIDATION as ELPV_VALIDATION

#: The networks of each data set. Their runs go by these names, those on the digits without " on digits".
NETWORKS = {"digits": ("ViT", "ResNet"), "elpv": ("small ViT", "small ResNet", "EfficientNet-Lite0")}
VALIDATION = 400  # of the held-out digits; the others are the test set

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A network and its images, with everything that all rows have in common."""

    build: Callable[[], nn.Module]
    numbers: dict[str, float]  # lr, weight_decay and rho: what the factors of the table multiply
    momentum: float
    epochs: int
    batch_size: int
    train: Labelled
    validation: Labelled
    test: Labelled

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.train[1]) // self.batch_size)


def names(data: str) -> tuple[str, ...]:
    """Of the networks on a data set, as runs have them."""
    return tuple(network if data == "digits" else f"{network} on {data}" for network in NETWORKS[data])


@cache
def problem(name: str, quick: bool = False) -> Problem:
    """That of :func:`names`; ``quick``: two epochs of a few steps.

    Raises what :func:`~fastsam.commands.training.data.open_dataset` does where its images cannot be had.
    """
    network, _, data = name.partition(" on ")
    return _photographs(network, quick) if data else _digits(network, quick)


def _digits(network: str, quick: bool) -> Problem:
    """The demo's."""
    from fastsam.commands.demo import settings

    chosen = (settings.QUICK_MODELS if quick else settings.MODELS)[network]
    split = settings.QUICK_DATA if quick else settings.DATA
    train, held_out = noisy_digits(split.train_size, split.label_noise, split.split_seed)
    return Problem(
        build=chosen.build,
        numbers={"lr": chosen.lr, "weight_decay": chosen.weight_decay, "rho": chosen.rho},
        momentum=chosen.momentum,
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        train=train.pair(),
        validation=held_out[:VALIDATION].pair(),
        test=held_out[VALIDATION:].pair(),
    )


def _photographs(network: str, quick: bool) -> Problem:
    """The network, the numbers that the search starts from and the split of the papers' table, without augmentation."""
    from benchmarks.papers import networks, tables, train

    (settings,) = (row.settings for row in tables.read("elpv").rows if row.name == f"{network}/SAM")
    if quick:
        settings = dataclasses.replace(settings, epochs=2, batch_size=16, train_size=64)
    images, test = train.images_of(settings.data, None, settings.image_size)
    cut = len(images) - ELPV_VALIDATION
    parts = images[:cut][: settings.train_size], images[cut:], test
    prepare = train.Prepare(settings, parts[0].images, "cpu")
    kept, validation, test = (dataclasses.replace(part, images=prepare(part.images)) for part in parts)
    channels, side = kept.images.shape[1:3]
    return Problem(
        build=partial(networks.build, settings, len(kept.classes), channels, side),
        numbers={name: getattr(settings, name) for name in ("lr", "weight_decay", "rho")},
        momentum=settings.momentum,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        train=kept.pair(),
        validation=validation.pair(),
        test=test.pair(),
    )
