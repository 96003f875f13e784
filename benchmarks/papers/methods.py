"""Every method of the tables: which optimizer it is, and what it does besides the training loop's own steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.papers.settings import TrainSettings
from benchmarks.papers.variants import GradientComponent, ReverseSAM
from fastsam import (
    GSAM,
    SAM,
    WSAM,
    EigenSAM,
    FriendlyEigenSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    StableSAM,
    VaSSO,
)
from fastsam.commands.training.loop import Training
from fastsam.methods.eigen import Estimate

#: Each method's class, the settings it takes, and fixed arguments. SGD and EGR have the base optimizer alone.
METHODS: dict[str, tuple[type | None, tuple[str, ...], dict]] = {
    "SGD": (None, (), {}),
    "AdamW": (None, (), {}),
    "SAM": (SAM, ("rho",), {}),
    "ASAM": (SAM, ("rho",), {"adaptive": True}),
    "F-SAM": (FriendlySAM, ("rho", "sigma", "lmbda"), {}),
    "Eigen-SAM": (EigenSAM, ("rho", "alpha", "freq"), {"estimate": Estimate(eval_mode=True)}),  # as the authors do
    "F-Eigen-SAM": (
        FriendlyEigenSAM,
        ("rho", "sigma", "lmbda", "alpha", "freq"),
        {"estimate": Estimate(eval_mode=True)},
    ),
    "Momentum-SAM": (MomentumSAM, ("rho",), {}),
    "GSAM": (GSAM, ("rho", "alpha"), {}),
    "WSAM": (WSAM, ("rho", "gamma"), {}),
    "LookSAM": (LookSAM, ("rho", "k", "alpha"), {}),
    "Stable SAM": (StableSAM, ("rho",), {}),
    "VaSSO": (VaSSO, ("rho", "theta"), {}),
    "Reverse-SAM": (ReverseSAM, ("rho",), {}),
    "EGR": (None, (), {}),
    "full gradient only": (GradientComponent, ("rho", "lmbda"), {"component": "full"}),
    "noise only": (GradientComponent, ("rho", "lmbda"), {"component": "noise"}),
}
BASES = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def build(settings: TrainSettings, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a row."""
    base = BASES[settings.base]
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if base is torch.optim.SGD:
        options["momentum"] = settings.momentum
    method, own, fixed = METHODS[settings.method]
    if method is None:
        return base(params, **options)
    return method(params, base, **{name: getattr(settings, name) for name in own}, **fixed, **options)


def before_step(settings: TrainSettings, training: Training, place: int) -> None:
    """What a row has done before the step of this place in its epoch."""
    optimizer = training.optimizer
    if settings.full_gradient == "exact" and isinstance(optimizer, GradientComponent):
        optimizer.eigenvector = full_gradient(training)
    if settings.count_in_epoch and place == 0 and isinstance(optimizer, EigenSAM):
        optimizer.param_groups[0]["steps"] = 0  # what freq counts


def full_gradient(training: Training) -> list[Tensor]:
    """The gradient of the mean loss over the training set, in eval mode and without augmentation."""
    params = [p for p in training.model.parameters() if p.requires_grad]
    training.model.eval()
    total = [torch.zeros_like(p) for p in params]
    for images, labels in training.batches.whole():
        loss = F.cross_entropy(training.model(images), labels, reduction="sum") / len(training.batches)
        torch._foreach_add_(total, torch.autograd.grad(loss, params))
    training.model.train()
    return total


def backward(settings: TrainSettings, loss: Tensor, model: nn.Module) -> None:
    """The backward pass of a row; EGR's is of L + rho ||grad L||, whose gradient is SAM's to first order in rho."""
    if settings.method == "EGR":
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
        loss = loss + settings.rho * torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    loss.backward()
