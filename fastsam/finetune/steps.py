"""One training step, for any model that maps images to logits: plain functions, for loops of other kinds as well.

    closure = make_closure(lambda images, labels: cross_entropy(network(images), labels), parts=4)
    step = make_step(optimizer, closure, model=model)
    loss = step(images, labels)

``network`` may be the model itself, or what ``torch.compile`` or ``DistributedDataParallel`` made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastsam import SAM, EigenSAM, FriendlySAM
from fastsam.finetune.batches import Batch
from fastsam.finetune.interruption import memory_watched
from fastsam.optimizer import SharpnessAware

Closure = Callable[[Tensor, Tensor], Tensor]


def make_optimizer(settings, groups: list[dict], base: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The method of ``settings`` around the base optimizer, or the base optimizer alone for ``method="none"``.

    Raises ``ValueError`` for arguments that the base optimizer does not take.
    """
    arguments = settings.optimizer_arguments()
    try:
        plain = base([dict(group) for group in groups], **arguments)  # it writes its defaults into them
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"torch.optim.{base.__name__} does not take {given}: {error}") from None
    rho = settings.rho
    if settings.method == "none":
        return plain
    if settings.method == "fsam":
        return FriendlySAM(groups, base, rho=rho, sigma=settings.sigma, lmbda=settings.lmbda, **arguments)
    if settings.method == "eigen-sam":
        return EigenSAM(groups, base, rho=rho, alpha=settings.alpha, freq=settings.freq, **arguments)
    return SAM(groups, base, rho=rho, adaptive=settings.method == "asam", **arguments)


def make_closure(loss_fn: Closure, parts: int = 1, scaler: GradScaler | None = None) -> Closure:
    """A forward and backward pass over a batch in ``parts`` of one size; returns the mean loss, detached.

    ``loss_fn(images, labels)`` is the mean loss of a part. Raises ``OutOfMemory`` where memory runs out.
    """

    def closure(images: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=images.device)
        with memory_watched():
            for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                loss = loss_fn(x, y) / parts
                (loss if scaler is None else scaler.scale(loss)).backward()
                total = total + loss.detach()
        return total

    return closure


def make_step(
    optimizer: torch.optim.Optimizer,
    closure: Closure,
    *,
    model: nn.Module,
    scaler: GradScaler | None = None,
    max_norm: float | None = None,
    perturb_parts: int = 0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """``step(images, labels)``: one update, which returns the loss at the weights before it.

    With ``perturb_parts`` = n the batch comes in n parts with a perturbation each, and ``closure`` is that of one part.
    """
    if not isinstance(optimizer, SharpnessAware):
        return lambda images, labels: _plain_step(optimizer, closure, images, labels, scaler, max_norm)

    def two_passes(images: Tensor, labels: Tensor) -> Tensor:
        loss = optimizer.step(lambda: closure(images, labels), model=model, grad_scaler=scaler, max_norm=max_norm)
        _update(scaler)
        return loss

    def two_passes_for_each_part(images: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=images.device)
        try:
            for x, y in zip(images.chunk(perturb_parts), labels.chunk(perturb_parts), strict=True):
                total = total + optimizer.accumulate(lambda x=x, y=y: closure(x, y), model=model, grad_scaler=scaler)
        except BaseException:
            optimizer.zero_grad()  # the parts before this one are no step
            raise
        optimizer.descend(zero_grad=True, grad_scaler=scaler, max_norm=max_norm)
        _update(scaler)
        return total / perturb_parts

    return two_passes_for_each_part if perturb_parts else two_passes


@torch.no_grad()
def evaluate(network: Callable[[Tensor], Tensor], model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy over all images, in eval mode; ``model`` is then in its mode again."""
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    try:
        for images, labels in batches:
            with memory_watched():
                logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(dim=1) == labels).sum()
            total += torch.stack([loss.double(), right.double(), torch.full_like(loss, len(labels)).double()]).cpu()
    finally:
        model.train(training)
    loss, right, count = total.tolist()
    return loss / count, right / count


def warmup_then_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor on lr: rises linearly to 1 within ``warmup`` steps, then falls along half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _plain_step(optimizer, closure: Closure, images: Tensor, labels: Tensor, scaler, max_norm) -> Tensor:
    optimizer.zero_grad()
    loss = closure(images, labels)
    if scaler is not None:
        scaler.unscale_(optimizer)
    if max_norm is not None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, max_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return loss


def _update(scaler: GradScaler | None) -> None:
    if scaler is not None:
        scaler.update()
