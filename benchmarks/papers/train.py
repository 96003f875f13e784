"""One training run: a row of a table with one seed, in a folder of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers import methods, networks
from benchmarks.papers.measure import Curvature
from benchmarks.papers.tables import TrainSettings
from fastsam.training.augment import cutout, label_noise, random_crop, random_flip
from fastsam.training.data import DataError, ImageSet, in_memory, open_dataset
from fastsam.training.run import RunFolder, random_state, set_random_state


def run(
    settings: TrainSettings, seed: int, folder: Path, device: str, data_dir: Path | None, save_seconds: float
) -> dict:
    """Trains, or goes on from the last checkpoint, and returns the result that ``result.json`` holds.

    The seed fixes the initial weights, the order of batches, augmentation and wrong labels, alike for every method.
    The accuracy is that of the last epoch. A checkpoint is written after an epoch if the last one is ``save_seconds``
    old; a run that was killed ends with the same weights as one that was not.
    """
    with RunFolder(folder, {**dataclasses.asdict(settings), "seed": seed}) as files:
        if files.result is not None:
            return files.result
        training = Training(settings, seed, device, data_dir, folder)
        state = files.load()
        if state is not None:
            training.load_state_dict(state)
        if training.curvature is not None:
            training.curvature.forget_from(training.steps_done)
        last = time.monotonic()
        while training.epoch < settings.epochs:
            files.log(training.one_epoch())
            if training.epoch == settings.epochs or time.monotonic() - last >= save_seconds:
                files.save(training.steps_done, training.state_dict())
                last = time.monotonic()
        files.finish(training.result())
        return files.result


class Training:
    """A model, its optimizer and its data, and everything that must be kept to go on later."""

    def __init__(self, settings: TrainSettings, seed: int, device: str, data_dir: Path | None, folder: Path) -> None:
        if device.startswith("cuda"):
            torch.backends.cudnn.deterministic = True
        self.settings, self.device = settings, torch.device(device)
        self.data = Data(settings, seed, self.device, data_dir)
        torch.manual_seed(seed)
        side = settings.scale_to or self.data.train_images.shape[-1]
        model = networks.build(settings, self.data.classes, self.data.train_images.shape[1], side)
        self.model = model.to(self.device)
        self.optimizer = methods.build(settings, self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            getattr(self.optimizer, "base_optimizer", self.optimizer), self._lr_factor
        )
        self.curvature = Curvature(settings, self.optimizer, self.model, folder) if settings.measure_every else None
        self.epoch, self.seconds, self.last = 0, 0.0, {}

    @property
    def steps_done(self) -> int:
        return self.epoch * self.data.steps_per_epoch

    def one_epoch(self) -> dict:
        """Trains for an epoch and tests; the row of ``metrics.csv``."""
        begin, losses, step = time.monotonic(), [], self.steps_done
        for place, (images, labels) in enumerate(self.data.epoch()):
            self.model.train()

            def loss_fn(images=images, labels=labels) -> Tensor:
                return F.cross_entropy(self.model(images), labels)

            if self.curvature is not None:
                self.curvature.if_due(step + place, *self.data.sample())
            loss = methods.step(self.settings, self.optimizer, self.model, loss_fn, place, self._full_gradient)
            losses.append(loss.detach())
            self._after_step(place)
        self.epoch += 1
        test_loss, accuracy = self.test()
        self.seconds += time.monotonic() - begin
        self.last = {
            "step": self.steps_done,
            "epoch": self.epoch,
            "train_loss": torch.stack(losses).mean().item(),
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "lr": self.schedule.get_last_lr()[0],
            "seconds": round(self.seconds, 3),
        }
        return self.last

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """(cross-entropy, accuracy in per cent) on the test set."""
        self.model.eval()
        loss, right = 0.0, 0
        for images, labels in self.data.test():
            logits = self.model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(dim=1) == labels).sum().item()
        return loss / len(self.data.test_labels), 100 * right / len(self.data.test_labels)

    def result(self) -> dict:
        curvature = {} if self.curvature is None else self.curvature.summary(self.steps_done, *self.data.sample())
        parameters = sum(p.numel() for p in self.model.parameters())
        return {**self.last, **curvature, "parameters": parameters, "device": self.device.type}

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "last": self.last,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_state(),
            "data": self.data.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.seconds, self.last = state["epoch"], state["seconds"], state["last"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.data.load_state_dict(state["data"])
        set_random_state(state["random"])

    def _after_step(self, place: int) -> None:
        if self.settings.schedule == "step" or place == self.data.steps_per_epoch - 1:
            self.schedule.step()

    def _lr_factor(self, count: int) -> float:
        """Linear warm-up, then half a cosine to 0."""
        per = self.data.steps_per_epoch if self.settings.schedule == "step" else 1
        total = self.settings.epochs * per
        warmup = round(self.settings.warmup * total)
        if count < warmup:
            return (count + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (count - warmup) / max(1, total - warmup)))

    def _full_gradient(self) -> list[Tensor]:
        """The gradient of the mean loss over the training set, in eval mode and without augmentation."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        total = [torch.zeros_like(p) for p in params]
        for images, labels in self.data.whole():
            loss = F.cross_entropy(self.model(images), labels, reduction="sum") / len(self.data.train_labels)
            torch._foreach_add_(total, torch.autograd.grad(loss, params))
        self.model.train()
        return total


class Data:
    """The data set of a row in the device's memory, with wrong labels, and its batches."""

    def __init__(self, settings: TrainSettings, seed: int, device: torch.device, data_dir: Path | None) -> None:
        self.settings = settings
        train, test = _images(settings.data, data_dir, settings.image_size or None)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise DataError(
                f"{settings.data}: training images are {tuple(train.images.shape[1:])}, test images are not"
            )
        images, labels = train.images, train.labels
        if settings.validation:
            kept = len(labels) - settings.validation
            if kept < settings.batch_size:
                raise ValueError(f"validation={settings.validation} of {len(labels)} images leaves less than a batch")
            self.test_images, self.test_labels = images[kept:].to(device), labels[kept:].to(device)
            images, labels = images[:kept], labels[:kept]
        else:
            self.test_images, self.test_labels = test.images.to(device), test.labels.to(device)
        if settings.train_size:
            images, labels = images[: settings.train_size], labels[: settings.train_size]
        self.classes = len(train.classes)
        self.train_images = images.to(device)
        self.train_labels = label_noise(labels, settings.label_noise, self.classes, seed).to(device)
        self.mean, self.std = (m.to(device) for m in _statistics(settings, images))
        full, rest = divmod(len(labels), settings.batch_size)
        self.steps_per_epoch = full + bool(rest and not settings.drop_last)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={settings.batch_size} with drop_last for {len(labels)} images: no whole batch"
            )
        self._order = torch.Generator().manual_seed(seed)
        self._augmentation = torch.Generator(device).manual_seed(seed)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch in a fresh order, augmented: flip, crop, normalise, cut out."""
        order = torch.randperm(len(self.train_labels), generator=self._order).to(self.train_labels.device)
        for batch in order.split(self.settings.batch_size)[: self.steps_per_epoch]:
            images, labels = self.train_images[batch], self.train_labels[batch]
            if self.settings.flip:
                images = random_flip(images, self._augmentation)
            if self.settings.crop:
                images = random_crop(images, self.settings.crop, self._augmentation)
            images = self._ready(images)
            if self.settings.cutout:
                images = cutout(images, self.settings.cutout, self._augmentation)
            yield images, labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._plain(self.test_images, self.test_labels)

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set in order, without augmentation."""
        return self._plain(self.train_images, self.train_labels)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The images on which curvature is measured, always the same."""
        n = self.settings.measure_size
        return self._ready(self.train_images[:n]), self.train_labels[:n]

    def state_dict(self) -> dict:
        return {"order": self._order.get_state(), "augmentation": self._augmentation.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self._order.set_state(state["order"])
        self._augmentation.set_state(state["augmentation"])

    def _plain(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(self.settings.batch_size, 256)
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            yield self._ready(x), y

    def _ready(self, images: Tensor) -> Tensor:
        images = (images.float() / 255 - self.mean) / self.std
        if self.settings.scale_to:
            images = F.interpolate(images, size=self.settings.scale_to, mode="bilinear", antialias=False)
        return images


@cache
def _images(data: str, data_dir: Path | None, size: int | None) -> tuple[ImageSet, ImageSet]:
    """Training and test images, read once by a process that runs many rows."""
    splits = open_dataset(data, data_dir=data_dir)
    return in_memory(splits.train, size), in_memory(splits.test, size)


def _statistics(settings: TrainSettings, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel in [0, 1], as (1, C, 1, 1)."""
    channels = images.shape[1]
    if settings.mean or settings.std:
        if not len(settings.mean) == len(settings.std) == channels:
            raise ValueError(f"mean={settings.mean} and std={settings.std} must have {channels} numbers, one a channel")
        values = (torch.tensor(settings.mean), torch.tensor(settings.std))
    else:
        pixels = images.transpose(0, 1).flatten(1).float() / 255
        values = (pixels.mean(dim=1), pixels.std(dim=1).clamp_min(1e-6))
    return values[0].view(1, -1, 1, 1), values[1].view(1, -1, 1, 1)
