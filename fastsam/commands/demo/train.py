"""One training run: a model, a method, a seed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam import SAM, EigenSAM, FriendlySAM, MomentumSAM
from fastsam.commands.demo.settings import (
    SHARPNESS_RHO,
    SHARPNESS_TOLERANCE,
    CurvatureSettings,
    DataSettings,
    ModelSettings,
)
from fastsam.commands.training.batches import Batches
from fastsam.commands.training.data import ImageSet, noisy_digits
from fastsam.commands.training.loop import Closure, Training, take_step
from fastsam.curvature import CurvatureMonitor, Hessian, top_eigenpairs
from fastsam.methods.eigen import Estimate

OPTIMIZERS = {
    "SGD": torch.optim.SGD, "SAM": SAM, "F-SAM": FriendlySAM, "Eigen-SAM": EigenSAM,
    "MomentumSAM": MomentumSAM,
}  # fmt: skip
Images = tuple[ImageSet, ImageSet]  # for training and for testing


@dataclass
class Run:
    """What one run measured, in lists by epoch or by step.

    Losses are cross-entropies in nats on the training labels, accuracies shares of the test set, times in
    milliseconds. ``step_ms`` is a step without ``eigenvector_ms``, Eigen-SAM's estimates, and ``optimizer_ms`` what
    of it is neither forward nor backward pass. ``curvature`` holds the rows of a
    :class:`~fastsam.curvature.CurvatureMonitor`.
    """

    model: str
    method: str
    seed: int
    parameters: int = 0
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    eigenvector_ms: list[float] = field(default_factory=list)
    top_eigenvalue: float = math.nan
    eigenvalue_residual: float = math.nan
    loss_rise: float = math.nan
    curvature: list[dict[str, float]] = field(default_factory=list)

    @property
    def training_seconds(self) -> float:
        """All steps and estimates, without the tests after each epoch and the final measurement."""
        return (sum(self.step_ms) + sum(self.eigenvector_ms)) / 1000


def train(
    name: str,
    settings: ModelSettings,
    method: str,
    options: dict,
    data: Images,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
    curvature: tuple[CurvatureSettings, Path] | None = None,
) -> tuple[nn.Module, Run]:
    """Trains one model with one method; ``on_epoch`` is called after every epoch.

    ``curvature``, if given, has the run's curvature measured while it trains, into a CSV file.

    The seed fixes the initial weights and the order of the batches, the same for every method. The global
    random generator is left as it was.
    """
    batches = Batches(*data, settings.batch_size, seed)
    steps = settings.epochs * batches.steps_per_epoch
    with torch.random.fork_rng(devices=[]):
        training = Training(
            settings.build,
            lambda params: build_optimizer(params, method, settings, options),
            batches,
            seed=seed,
            epochs=settings.epochs,
            warmup=max(1, steps // 10),
        )
        run = Run(name, method, seed, parameters=sum(p.numel() for p in training.model.parameters()))
        monitor = _monitor(training, settings, steps, run, curvature)
        for row in training.epochs(monitor, _timed(run)):
            run.train_loss.append(row["train_loss"])
            run.test_accuracy.append(row["test_accuracy"])
            on_epoch()
        monitor(steps)
    return training.model, run


@cache
def digits(settings: DataSettings) -> Images:
    """The images for training, with wrong labels, and those for testing."""
    return noisy_digits(settings.train_size, settings.label_noise, settings.split_seed)


def build_optimizer(
    params: Iterable[nn.Parameter], method: str, settings: ModelSettings, options: dict
) -> torch.optim.Optimizer:
    """The method's optimizer on the SGD with momentum that all of them share."""
    sgd: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if method == "SGD":
        return torch.optim.SGD(params, **sgd)
    if method == "Eigen-SAM":  # the authors estimate in eval mode
        options = {**options, "estimate": replace(options.get("estimate", Estimate()), eval_mode=True)}
    rho = settings.momentum_sam_rho if method == "MomentumSAM" else settings.rho
    return OPTIMIZERS[method](params, torch.optim.SGD, rho=rho, **options, **sgd)


def measure_sharpness(model: nn.Module, images: Tensor, labels: Tensor, run: Run) -> None:
    """Sharpness at the final weights, in eval mode, of the loss on these images."""
    model.eval()

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(images), labels)

    pairs = top_eigenpairs(
        loss_fn, model, which="magnitude", tolerance=SHARPNESS_TOLERANCE, method="exact",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    run.top_eigenvalue, run.eigenvalue_residual = float(pairs.eigenvalues[0]), float(pairs.residuals[0])
    with Hessian(loss_fn, model) as hessian:
        loss, gradient = hessian.gradient()
        run.loss_rise = hessian.loss_at(gradient * (SHARPNESS_RHO / gradient.norm())) - loss


def _timed(run: Run):
    """A step of the training loop that writes its times into ``run``."""

    def step(optimizer: torch.optim.Optimizer, closure: Closure, model: nn.Module) -> Tensor:
        passes = []

        def timed() -> Tensor:
            start = perf_counter()
            loss = closure()
            passes.append((start, perf_counter()))
            return loss

        due = isinstance(optimizer, EigenSAM) and optimizer.eigenvector_due()
        begin = perf_counter()
        loss = take_step(optimizer, timed, model, **({"estimate_closure": closure} if due else {}))
        end = perf_counter()
        if due:  # the estimate comes before the first pass
            run.eigenvector_ms.append(_ms(passes[0][0] - begin))
            begin = passes[0][0]
        run.step_ms.append(_ms(end - begin))
        run.optimizer_ms.append(_ms(end - begin - sum(stop - start for start, stop in passes)))
        return loss

    return step


def _monitor(
    training: Training,
    settings: ModelSettings,
    steps: int,
    run: Run,
    curvature: tuple[CurvatureSettings, Path] | None,
) -> Callable[..., None]:
    """What is called before each step and at the end, and measures the curvature when it is due."""
    if curvature is None:
        return lambda *_: None
    chosen, path = curvature
    path.unlink(missing_ok=True)
    images, labels = training.batches.sample(chosen.images)
    model, every = training.model, min(chosen.every, steps)
    measure = CurvatureMonitor(
        training.optimizer, path, every, model=model, method="exact", eval_mode=True, rho=settings.rho
    )

    def monitor(step: int, place: int = 0) -> None:
        row = measure(lambda: F.cross_entropy(model(images), labels), step)
        if row is not None:
            run.curvature.append(row)

    return monitor


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
