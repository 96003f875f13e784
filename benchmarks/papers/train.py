"""One training run: a row of a table with one seed, in a folder of its own."""

from __future__ import annotations

import dataclasses
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers import methods, networks
from benchmarks.papers.measure import Curvature
from benchmarks.papers.settings import TrainSettings
from fastsam.commands.training.augment import label_noise
from fastsam.commands.training.batches import Batches
from fastsam.commands.training.data import DataError, ImageSet, in_memory, open_dataset
from fastsam.commands.training.loop import Training
from fastsam.commands.training.run import RunFolder


def run(
    settings: TrainSettings, seed: int, folder: Path, device: str, data_dir: Path | None, save_seconds: float
) -> dict:
    """Trains, or goes on from the last checkpoint, and returns the result that ``result.json`` holds.

    The seed fixes the initial weights, the order of batches, augmentation and wrong labels, alike for every method.
    The accuracy, in per cent, is that of the last epoch. A checkpoint is written after an epoch if the last one is
    ``save_seconds`` old; a run that was killed ends with the same weights as one that was not.
    """
    with RunFolder(folder, {**dataclasses.asdict(settings), "seed": seed}) as files:
        if files.result is not None:
            return files.result
        training = start(settings, seed, device, data_dir)
        state = files.load()
        if state is not None:
            training.load_state_dict(state)
        curvature = Curvature(settings, training, folder) if settings.measure_every else None
        if curvature is not None:
            curvature.forget_from(training.steps_done)

        def before_step(step: int, place: int) -> None:
            if curvature is not None:
                curvature.if_due(step)
            methods.before_step(settings, training, place)

        last = time.monotonic()
        for row in training.epochs(before_step):
            files.log(_in_per_cent(row))
            if training.epoch == settings.epochs or time.monotonic() - last >= save_seconds:
                files.save(training.steps_done, training.state_dict())
                last = time.monotonic()
        measured = {} if curvature is None else curvature.summary(training.steps_done)
        parameters = sum(p.numel() for p in training.model.parameters())
        files.finish(
            {**_in_per_cent(training.last), **measured, "parameters": parameters, "device": torch.device(device).type}
        )
        return files.result


def start(settings: TrainSettings, seed: int, device: str, data_dir: Path | None) -> Training:
    """A row's run before its first step."""
    if device.startswith("cuda"):
        torch.backends.cudnn.deterministic = True
    train, test = images_of(settings.data, data_dir, settings.image_size or None)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{settings.data}: training images are {tuple(train.images.shape[1:])}, test images are not")
    if settings.validation:
        kept = len(train) - settings.validation
        if kept < settings.batch_size:
            raise ValueError(f"validation={settings.validation} of {len(train)} images leaves less than a batch")
        train, test = train[:kept], train[kept:]
    train = train[: settings.train_size or len(train) : settings.train_every or 1]
    prepare = Prepare(settings, train.images, device)
    classes, (channels, side) = len(train.classes), train.images.shape[1:3]
    noisy = label_noise(train.labels, settings.label_noise, classes, seed)
    batches = Batches(
        dataclasses.replace(train, labels=noisy), test, settings.batch_size, seed,
        device=device, drop_last=settings.drop_last, prepare=prepare,
        flip=settings.flip, crop=settings.crop, cutout=settings.cutout,
    )  # fmt: skip
    per_epoch = settings.schedule == "epoch"
    return Training(
        lambda: networks.build(settings, classes, channels, settings.scale_to or side),
        partial(methods.build, settings),
        batches,
        seed=seed,
        epochs=settings.epochs,
        warmup=round(settings.warmup * settings.epochs * (1 if per_epoch else batches.steps_per_epoch)),
        lr_per_epoch=per_epoch,
        backward=partial(methods.backward, settings),
        ascent_share=settings.ascent_share,
        device=device,
    )


class Prepare:
    """Inputs of the network from uint8 images: normalised, and scaled.

    Without a mean of the settings by that of the network's weights, which makes three channels of grey images, or else
    by the training set's own.
    """

    def __init__(self, settings: TrainSettings, images: Tensor, device: str) -> None:
        channels = images.shape[1]
        if settings.mean or settings.std:
            if not len(settings.mean) == len(settings.std) == channels:
                raise ValueError(
                    f"mean={settings.mean} and std={settings.std} must have {channels} numbers, one a channel"
                )
            mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
        elif settings.network in networks.INPUTS:
            mean, std = map(torch.tensor, networks.INPUTS[settings.network])
        else:
            pixels = images.transpose(0, 1).flatten(1).float() / 255
            mean, std = pixels.mean(dim=1), pixels.std(dim=1).clamp_min(1e-6)
        self._mean, self._std = (values.view(1, -1, 1, 1).to(device) for values in (mean, std))
        self._side = settings.scale_to

    def __call__(self, images: Tensor) -> Tensor:
        images = (images.float() / 255 - self._mean) / self._std
        if self._side:
            images = F.interpolate(images, size=self._side, mode="bilinear", antialias=False)
        return images


def _in_per_cent(row: dict[str, float]) -> dict[str, float]:
    return {**row, "test_accuracy": 100 * row["test_accuracy"]}


@cache
def images_of(data: str, data_dir: Path | None, size: int | None) -> tuple[ImageSet, ImageSet]:
    """Training and test images, read once by a process that runs many rows."""
    splits = open_dataset(data, data_dir=data_dir)
    return in_memory(splits.train, size), in_memory(splits.test, size)
