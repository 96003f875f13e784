"""A fine-tuning run from settings to saved model, which may be killed at any moment and goes on where it was.

Everything random is a function of the seed and of the step: the order of the images of an epoch, augmentation and
dropout of a step. So a checkpoint needs no generator's state, and the weights do not depend on how often a run was
stopped, nor on what else drew random numbers meanwhile.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.finetune import model as models
from fastsam.finetune.batches import Batch, InMemory, Streamed, open_images, remaining, seed_of
from fastsam.finetune.groups import parameter_groups
from fastsam.finetune.interruption import Interrupted, OutOfMemory, Stop, memory_watched, what_to_lower
from fastsam.finetune.settings import ADDED, PRECISIONS, Settings, optimizers
from fastsam.finetune.show import Logs, Show, memory_mib
from fastsam.finetune.steps import evaluate, make_closure, make_optimizer, make_step, warmup_then_cosine
from fastsam.finetune.surroundings import (
    check_packages,
    deterministic,
    device_of,
    generators_kept,
    quiet_libraries,
    seed_everything,
)
from fastsam.training import augment
from fastsam.training.data import DataError, Splits, open_dataset, open_image
from fastsam.training.run import RunFolder

SAVE_SECONDS = 600
NO_MEMORY = "out of memory ({}): lower --batch-size. If there is a checkpoint, it is intact"
ROWS_PER_EPOCH = 20


def run(settings: Settings, show: Show | None = None) -> dict[str, Any]:
    """Trains, evaluates and saves; returns what ``result.json`` holds. An unfinished run in the folder goes on.

    The global random generators are left as they were. Raises ``ValueError`` for what cannot be used, ``OSError``
    without space on the disk, ``OutOfMemory`` with what to lower, ``Interrupted`` after Ctrl-C or SIGTERM; the same
    run goes on after each.
    """
    check_packages(settings)
    device = device_of(settings)
    with show or Show() as shown, generators_kept(), deterministic(settings, device), quiet_libraries():
        splits = open_dataset(settings.data, data_dir=settings.data_dir)
        if len(splits.train) < settings.batch_size:
            raise ValueError(f"--batch-size {settings.batch_size} is more than the {len(splits.train)} training images")
        seed_everything(settings.seed, "weights")
        example = open_image(splits.train, 0)
        model, preparation = models.load(settings.model, splits.classes, example, shown.say, settings.image_size)
        found = {"train_images": len(splits.train), "test_images": len(splits.test), "classes": splits.classes}
        added = {**ADDED, "test_images": len(splits.test)}
        with RunFolder(settings.output, {**settings.as_json(), **found}, settings.may_change(), added) as folder:
            if folder.result is None:
                with memory_watched(NO_MEMORY):
                    Job(settings, device, splits, model, preparation, folder, shown).finish()
            else:
                shown.say(f"{folder.path} holds this run, and it is finished: for a new one name another --output")
            shown.result(folder.result)
            return folder.result


class Job:
    """One run: what is built before its first step, what its checkpoint holds, and its loop."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        splits: Splits,
        model: nn.Module,
        preparation: models.Preparation,
        folder: RunFolder,
        show: Show,
    ) -> None:
        self.settings, self.device, self.splits, self.folder, self.show = settings, device, splits, folder, show
        self.preparation = preparation
        noise = seed_of(settings.seed, "label noise")
        labels = augment.label_noise(_labels(splits.train), settings.label_noise, len(splits.classes), noise)
        self.train = self._images(splits.train, labels)
        self.test = self._images(splits.test, _labels(splits.test))
        self.steps_per_epoch = len(self.train) // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch

        self.model = model.to(device).train()
        if settings.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise ValueError(f"--gradient-checkpointing: {type(model).__name__} does not support it")
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.network = torch.compile(model) if settings.compile else model
        arguments = settings.optimizer_arguments()
        groups = parameter_groups(model, settings.lr, arguments.get("weight_decay"), settings.layer_decay)
        self.optimizer = make_optimizer(settings, groups, optimizers()[settings.optimizer.lower()])
        warmup = round(settings.warmup * self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_cosine(warmup, self.steps))
        self.scaler = torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None
        self._step = None  # made when a batch is at hand

        self.loss_sum = torch.zeros((), device=device)  # over the steps since the last row
        self.progress = {"step": 0, "evaluated": 0, "seconds": 0.0, "waited": 0.0}
        self.progress |= {"test_loss": 0.0, "test_accuracy": 0.0, "images_per_second": []}
        self.progress |= {"best_step": 0, "best_accuracy": -1.0}
        self.last_row = {"step": 0, "seconds": 0.0, "waited": 0.0}
        self._resume()

    @property
    def step(self) -> int:
        return self.progress["step"]

    def finish(self) -> None:
        """Trains from wherever the run stands to its end, then saves the model and the result."""
        size, seed = self.settings.batch_size, self.settings.seed
        # One iterator for the whole run, so that workers are ahead across epochs as well.
        self._batches = self.train.batches(remaining(len(self.train), size, seed, self.step, self.steps))
        logs = Logs(self.settings.log, self.folder.path, self.settings.as_json(), self.step)
        self.show.training(self.step, self.steps)
        try:
            with Stop() as stop:
                while True:
                    if self.step % self.steps_per_epoch == 0 and self.step > self.progress["evaluated"]:
                        self._evaluate(logs)
                        self._save()
                    if self.step == self.progress["best_step"] > 0:
                        # After the checkpoint, which has these weights: a run that was killed in between gets here.
                        self._save_model("best")
                    self._leave_if(stop)
                    if self.step == self.steps:
                        break
                    self._rest_of_epoch(stop, logs)
        except OutOfMemory as error:
            self._save()  # nothing of the step that failed has happened
            raise OutOfMemory(what_to_lower(self.settings, self.step, error)) from error
        except DataError as error:
            self._save()
            raise DataError(
                f"{error}. Step {self.step} is saved: with as many images as before the same command goes on from there"
            ) from error
        finally:
            self._batches.close()  # ends the workers, which nothing else does while the interpreter exits
            logs.close()
        self.folder.finish(self._result(str(self._save_model("model"))))

    def _rest_of_epoch(self, stop: Stop, logs: Logs) -> None:
        done = self.step % self.steps_per_epoch
        rows = {i * self.steps_per_epoch // ROWS_PER_EPOCH for i in range(1, ROWS_PER_EPOCH)}  # and one at its end
        saved = time.monotonic()
        for within in range(done + 1, self.steps_per_epoch + 1):
            start = time.perf_counter()
            images, labels = next(self._batches)
            self.progress["waited"] += time.perf_counter() - start
            self._train_on(images, labels)
            self.progress["seconds"] += time.perf_counter() - start
            self.show.stepped(self.step)
            if within in rows:
                self._row(logs)
            asked = self.settings.save_every and self.step % self.settings.save_every == 0
            if asked or stop.signal or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
                self._leave_if(stop)

    def _train_on(self, images: Tensor, labels: Tensor) -> None:
        """One step of the run, from uint8 images."""
        seed = seed_everything(self.settings.seed, "step", self.step)
        images = self._augmented(self.preparation.normalised(images), seed)
        if self._step is None:
            self._step = self._make_step(images, labels)
        self.loss_sum += self._step(images, labels)
        self.schedule.step()
        self.progress["step"] += 1

    def _make_step(self, images: Tensor, labels: Tensor):
        settings = self.settings

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self._logits(x), y, label_smoothing=settings.label_smoothing)

        parts = 1 if settings.perturb_parts else settings.accumulate
        closure = make_closure(loss_fn, parts, self.scaler)
        if settings.cuda_graph:
            from fastsam import graphs

            options = {"model": self.model, "max_norm": settings.max_norm}
            return graphs.capture(self.optimizer, closure, images, labels, **options)
        perturb_parts = settings.accumulate if settings.perturb_parts else 0
        options = {"model": self.model, "scaler": self.scaler, "max_norm": settings.max_norm}
        return make_step(self.optimizer, closure, perturb_parts=perturb_parts, **options)

    def _logits(self, images: Tensor) -> Tensor:
        dtype = PRECISIONS[self.settings.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.network(pixel_values=images).logits.float()

    def _augmented(self, images: Tensor, seed: int) -> Tensor:
        settings = self.settings
        if not (settings.random_crop or settings.flip or settings.cutout):
            return images
        generator = torch.Generator(images.device).manual_seed(seed)
        if settings.random_crop:
            images = augment.random_crop(images, settings.random_crop, generator)
        if settings.flip:
            images = augment.random_flip(images, generator)
        if settings.cutout:
            images = augment.cutout(images, settings.cutout, generator)
        return images

    # ---- what is measured ------------------------------------------------------------------------------

    def _evaluate(self, logs: Logs) -> None:
        size = self.settings.batch_size // self.settings.accumulate  # what the memory holds with gradients
        batches = self._prepared(self.test.batches(torch.arange(len(self.test)).split(size)))
        loss, accuracy = evaluate(self._logits, self.model, batches)
        self.progress |= {"evaluated": self.step, "test_loss": loss, "test_accuracy": accuracy}
        if accuracy > self.progress["best_accuracy"]:
            self.progress |= {"best_step": self.step, "best_accuracy": accuracy}
        self._row(logs, test_loss=loss, test_accuracy=accuracy)

    def _prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for images, labels in batches:
            yield self.preparation.normalised(images), labels

    def _row(self, logs: Logs, test_loss: float | None = None, test_accuracy: float | None = None) -> None:
        """A row of metrics.csv: means since the last one."""
        start = time.perf_counter()
        loss = self.loss_sum.item()  # waits for the steps since the last row, which is training time
        self.progress["seconds"] += time.perf_counter() - start
        past = {name: self.progress[name] - self.last_row[name] for name in self.last_row}
        row = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": loss / max(1, past["step"]),
            "lr": max(self.schedule.get_last_lr()),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_second": past["step"] * self.settings.batch_size / max(past["seconds"], 1e-9),
            "data_wait_share": past["waited"] / max(past["seconds"], 1e-9),
            "memory_mib": memory_mib(self.device),
        }
        self.progress["images_per_second"].append(row["images_per_second"])
        self.loss_sum.zero_()
        self.last_row = {name: self.progress[name] for name in self.last_row}
        self.folder.log(row)
        logs.add(row)
        self.show.measured(row)
        if not (math.isfinite(loss) or math.isfinite(test_loss or 0.0)):
            # Such steps change nothing: the rest of the run would be as this one.
            raise self._diverged("the losses in training and testing are")

    def _result(self, saved: str) -> dict[str, Any]:
        settings, progress = self.settings, self.progress
        return {
            "model": settings.model,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": settings.data,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "method": settings.method,
            "optimizer": type(getattr(self.optimizer, "base_optimizer", self.optimizer)).__name__,
            "test_accuracy": progress["test_accuracy"],
            "best_accuracy": progress["best_accuracy"],
            "best_epoch": progress["best_step"] // self.steps_per_epoch,
            "test_loss": progress["test_loss"],
            "steps": self.step,
            "seconds": progress["seconds"],
            "images_per_second": statistics.median(progress["images_per_second"]),  # the first has the start in it
            "data_wait_share": progress["waited"] / progress["seconds"],
            "data_in_memory": isinstance(self.train, InMemory),
            "memory_mib": memory_mib(self.device),
            "device": str(self.device),
            "saved": saved,
        }

    # ---- what is kept ----------------------------------------------------------------------------------

    def _save(self) -> None:
        if not torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all():
            raise self._diverged("the weights are")
        payload = {name: part.state_dict() for name, part in self._parts().items()}
        payload |= {"loss_sum": self.loss_sum, "progress": self.progress, "last_row": self.last_row}
        self.folder.save(self.step, payload)

    def _save_model(self, name: str) -> Path:
        return models.save(self.model, self.preparation.processor, self.folder.path / name, self.step)

    def _diverged(self, what: str) -> ValueError:
        last = "there is none" if self.folder.step is None else f"that of step {self.folder.step} is intact"
        return ValueError(
            f"{what} not finite at step {self.step}: lower --lr, or give --max-norm 1, and another --output. "
            f"Nothing was saved over the last checkpoint: {last}"
        )

    def _resume(self) -> None:
        payload = self.folder.load()
        if payload is None:
            return
        for name, part in self._parts().items():
            part.load_state_dict(payload[name])
        self.loss_sum.copy_(payload["loss_sum"])
        self.progress |= payload["progress"]
        self.last_row = payload["last_row"]
        if "best_step" not in payload["progress"]:  # of a version without best/: the best is that from here on
            known = self.step == self.progress["evaluated"] > 0
            self.progress["best_step"] = self.step if known else 0
            self.progress["best_accuracy"] = self.progress["test_accuracy"] if known else -1.0
        self.show.say(f"going on from step {self.step} of {self.steps} in {self.folder.path}")

    def _parts(self) -> dict[str, Any]:
        # Optimizer first: it refuses while the weights are perturbed.
        parts = {"optimizer": self.optimizer, "model": self.model, "schedule": self.schedule}
        return parts if self.scaler is None else {**parts, "scaler": self.scaler}

    def _images(self, dataset, labels: Tensor) -> InMemory | Streamed:
        workers = self.settings.workers
        return open_images(dataset, labels, self.preparation, self.device, workers, self.show.decoding)

    # ---- how it may end --------------------------------------------------------------------------------

    def _leave_if(self, stop: Stop) -> None:
        if stop.signal:
            text = f"stopped at step {self.step} of {self.steps}, all of it saved in {self.folder.path}"
            raise Interrupted(f"{text}: the same command goes on from there", stop.signal)


def _labels(dataset) -> Tensor:
    return torch.tensor(dataset["label"][:], dtype=torch.int64)
