"""Loss, accuracy and accuracy by class on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor], model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of right answers over all images, in eval mode.

    ``network`` gives the logits: ``model`` itself, or what wraps it. Every module is in its mode again afterwards.
    """
    total = torch.zeros(3, dtype=torch.float64)
    with _eval_mode(model):
        for images, labels in batches:
            logits = network(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(dim=1) == labels).sum()
            total += torch.stack([loss.double(), right.double(), torch.full_like(loss, len(labels)).double()]).cpu()
    loss, right, count = total.tolist()
    return loss / count, right / count


@torch.no_grad()
def evaluate_by_class(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy in nats, images of each class, and how many of these are right (int64), in eval mode."""
    count, right = torch.zeros(2, classes, dtype=torch.int64)
    total = 0.0
    with _eval_mode(model):
        for images, labels in batches:
            logits = model(images)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += labels.cpu().bincount(minlength=classes)
            right += labels[logits.argmax(dim=1) == labels].cpu().bincount(minlength=classes)
    return total / int(count.sum()), count, right


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
