"""One training run: a model, a method, a seed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam import SAM, EigenSAM, FriendlySAM
from fastsam.curvature import CurvatureMonitor, Hessian, top_eigenpairs

from .data import Digits
from .settings import SHARPNESS_RHO, SHARPNESS_TOLERANCE, CurvatureSettings, ModelSettings

OPTIMIZERS = {"SGD": torch.optim.SGD, "SAM": SAM, "F-SAM": FriendlySAM, "Eigen-SAM": EigenSAM}


@dataclass
class Run:
    """What one run measured, in lists by epoch or by step.

    Losses are cross-entropies in nats on the training labels, accuracies shares of the test set, times in
    milliseconds. ``optimizer_ms`` is the part of ``step_ms`` spent in ``first_step`` and ``second_step``, or
    in SGD's ``step`` and ``zero_grad``; ``eigenvector_ms`` is Eigen-SAM's power iterations. ``curvature`` holds the
    rows of a :class:`~fastsam.curvature.CurvatureMonitor`.
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
        """All steps and power iterations, without the tests after each epoch and the final measurement."""
        return (sum(self.step_ms) + sum(self.eigenvector_ms)) / 1000


def train(
    name: str,
    settings: ModelSettings,
    method: str,
    options: dict[str, float],
    data: Digits,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
    curvature: tuple[CurvatureSettings, Path] | None = None,
) -> Run:
    """Train one model with one method and measure it; ``on_epoch`` is called after every epoch.

    ``curvature``, if given, has the run's curvature measured while it trains, into a CSV file.

    The seed fixes the initial weights and the order of the batches, the same for every method. The global
    random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = settings.build()
        run = Run(name, method, seed, parameters=sum(p.numel() for p in model.parameters()))
        optimizer = build_optimizer(model, method, settings, options)
        batches = torch.Generator().manual_seed(seed)
        steps = settings.epochs * (len(data.train_labels) // settings.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            getattr(optimizer, "base_optimizer", optimizer), _warmup_then_cosine(steps)
        )
        monitor = _monitor(model, optimizer, settings, data, steps, run, curvature)
        for _ in range(settings.epochs):
            loss = 0.0
            for images, labels in _shuffled(data, settings.batch_size, batches):
                monitor()
                loss += _step(model, optimizer, images, labels, run)
                schedule.step()
            run.train_loss.append(loss * settings.epochs / steps)
            run.test_accuracy.append(_accuracy(model, data.test_images, data.test_labels))
            on_epoch()
        monitor()
    measure_sharpness(model, data, run)
    return run


def build_optimizer(
    model: nn.Module, method: str, settings: ModelSettings, options: dict[str, float]
) -> torch.optim.Optimizer:
    """The method's optimizer on the SGD with momentum that all of them share."""
    sgd = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if method == "SGD":
        return torch.optim.SGD(model.parameters(), **sgd)
    return OPTIMIZERS[method](model.parameters(), torch.optim.SGD, rho=settings.rho, **options, **sgd)


@contextmanager
def batch_norm_statistics_frozen(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, but leave the running statistics alone.

    The second pass sees the perturbed weights; counting it would mix their activations into the statistics
    that the unperturbed weights are evaluated with.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, run: Run) -> float:
    """One step of training, timed; returns the loss at the unperturbed weights."""
    model.train()

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(images), labels)

    if isinstance(optimizer, EigenSAM) and optimizer.eigenvector_due():
        start = perf_counter()
        optimizer.update_eigenvector(loss_fn, model=model)
        run.eigenvector_ms.append(_ms(perf_counter() - start))

    start = perf_counter()
    loss = loss_fn()
    loss.backward()
    if hasattr(optimizer, "first_step"):
        climb = perf_counter()
        optimizer.first_step(zero_grad=True)
        climbed = perf_counter()
        with batch_norm_statistics_frozen(model):
            loss_fn().backward()
        descend = perf_counter()
        optimizer.second_step(zero_grad=True)
        end = perf_counter()
        inside = (climbed - climb) + (end - descend)
    else:
        descend = perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = perf_counter()
        inside = end - descend
    run.step_ms.append(_ms(end - start))
    run.optimizer_ms.append(_ms(inside))
    return loss.item()


def _monitor(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: ModelSettings,
    data: Digits,
    steps: int,
    run: Run,
    curvature: tuple[CurvatureSettings, Path] | None,
) -> Callable[[], None]:
    """What is called before each step and at the end, and measures the curvature when it is due."""
    if curvature is None:
        return lambda: None
    chosen, path = curvature
    path.unlink(missing_ok=True)
    images, labels = data.sharpness_subset(chosen.images)
    measure = CurvatureMonitor(
        optimizer, path, min(chosen.every, steps), model=model, method="exact", eval_mode=True, rho=settings.rho
    )

    def monitor() -> None:
        row = measure(lambda: F.cross_entropy(model(images), labels))
        if row is not None:
            run.curvature.append(row)

    return monitor


def measure_sharpness(model: nn.Module, data: Digits, run: Run) -> None:
    """Sharpness at the final weights, in eval mode, of the training loss on the fixed subset."""
    model.eval()
    images, labels = data.sharpness_subset()

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


def _shuffled(data: Digits, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of full batches in a fresh order; a last, smaller batch is dropped."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        yield data.train_images[batch], data.train_labels[batch]


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def _warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
