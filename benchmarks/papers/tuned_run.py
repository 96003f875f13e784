"""One run of a table whose numbers are chosen first; see :mod:`benchmarks.papers.tuned`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import torch
from torch import Tensor, nn

from benchmarks.papers import methods, results, train
from benchmarks.papers.measure import Curvature
from benchmarks.papers.methods import METHODS
from benchmarks.papers.settings import TrainSettings
from benchmarks.papers.tables import Row
from fastsam.commands.training.evaluate import evaluate_by_class
from fastsam.commands.training.loop import take_step

CURVE = ("step", "top_eigenvalue", "perturbation_alignment")
#: Gradients that a product with the Hessian is counted as: it goes forward and backward through forward and backward.
PRODUCT = 2
#: Gradients that a measurement of curvature is estimated as: some fifteen products.
MEASUREMENT = 30


@dataclass(frozen=True)
class Job:
    """One run: settings with their numbers, and a seed. Rows that come to the same runs share them."""

    row: str
    phase: str
    settings: TrainSettings
    seed: int
    data_dir: Path | None = None

    def key(self) -> str:
        """A checksum of the settings that are not defaults and of the seed."""
        content = {**results.settings_of(Row(self.row, self.settings)), "seed": self.seed}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def numbers_of(settings: TrainSettings) -> dict[str, float]:
    """What is searched: lr, weight_decay and the method's own."""
    own = METHODS[settings.method][1]
    return {name: getattr(settings, name) for name in ("lr", "weight_decay", *own) if name != "freq"}


def run(job: Job) -> dict:
    """Trains and tests; the record of the run.

    The seed fixes initial weights, the order of batches, augmentation and wrong labels, alike for every method.
    ``seconds`` are the processor's, of the training alone, so that what else the machine does hardly shows.
    """
    settings = job.settings
    training = train.start(settings, job.seed, "cpu", job.data_dir)
    estimates = Estimates()
    measuring = 0.0
    with tempfile.TemporaryDirectory() as folder:
        curvature = Curvature(settings, training, Path(folder)) if settings.measure_every else None

        def before_step(step: int, place: int) -> None:
            nonlocal measuring
            begin = process_time()
            if curvature is not None:
                curvature.if_due(step)
            measuring += process_time() - begin
            methods.before_step(settings, training, place)

        begin = process_time()
        for _ in training.epochs(before_step, estimates.step, test=False):
            pass
        seconds = process_time() - begin - measuring
        found: dict = {}
        if curvature is not None:
            curvature.measure(training.steps_done)
            found["curve"] = [[float(row[name]) for name in CURVE] for row in curvature.rows()]
    loss, count, right = evaluate_by_class(training.model, training.batches.test(), training.batches.classes)
    gradients = training.samples / (training.steps_done * settings.batch_size)
    return {
        "key": job.key(),
        "row": job.row,
        "phase": job.phase,
        "seed": job.seed,
        "numbers": numbers_of(settings),
        "accuracy": int(right.sum()) / int(count.sum()),
        "balanced": (right / count)[count > 0].mean().item(),
        "loss": loss if math.isfinite(loss) else None,
        "gradients": round(gradients + PRODUCT * estimates.products / training.steps_done, 4),
        "seconds": round(seconds, 2),
        **found,
    }


class Estimates:
    """Counts the products with the Hessian that estimates of the eigenvector take."""

    def __init__(self) -> None:
        self.products, self._last = 0, None

    def step(self, optimizer: torch.optim.Optimizer, closure, model: nn.Module, **options) -> Tensor:
        loss = take_step(optimizer, closure, model, **options)
        last = getattr(optimizer, "last_estimate", None)
        if last is not self._last:
            self._last = last
            self.products += last.products
        return loss


def seconds_of(settings: TrainSettings, data_dir: Path | None) -> float:
    """About how long a run takes a process of one thread, from plain steps timed now."""
    plain, per_epoch = _plain_seconds(settings, data_dir)
    steps = settings.epochs * per_epoch
    gradients = steps * nominal_gradients(settings)
    if settings.measure_every:
        gradients += MEASUREMENT * settings.measure_size / settings.batch_size * (steps / settings.measure_every + 1)
    return plain * gradients


def nominal_gradients(settings: TrainSettings) -> float:
    """Of a step, with the authors' five power steps for each estimate of the eigenvector."""
    method, own, _ = METHODS[settings.method]
    passes = 1 if method is None or settings.method == "Momentum-SAM" else 1 + settings.ascent_share
    return passes + ("freq" in own) * 5 * PRODUCT / settings.freq


_timed: dict[str, tuple[float, int]] = {}


def _plain_seconds(settings: TrainSettings, data_dir: Path | None) -> tuple[float, int]:
    """Of the fastest of three steps after one to warm up; and steps an epoch. Timed once for what is the same."""
    settings = dataclasses.replace(
        settings, method="SGD", base="SGD", lr=0.0, weight_decay=0.0, rho=0.0, ascent_share=1.0, label_noise=0.0,
        measure_every=0,
    )  # fmt: skip
    if repr(settings) in _timed:
        return _timed[repr(settings)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = train.start(settings, 0, "cpu", data_dir)
        images, labels = next(training.batches.epoch())
        found = []
        for _ in range(4):
            begin = process_time()
            nn.functional.cross_entropy(training.model(images), labels).backward()
            found.append(process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    _timed[repr(settings)] = min(found[1:]), training.batches.steps_per_epoch
    return _timed[repr(settings)]
