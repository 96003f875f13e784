"""Every method of the tables: which optimizer it is, and what one step of it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.papers.tables import TrainSettings
from benchmarks.papers.variants import GradientComponent, ReverseSAM
from fastsam import SAM, EigenSAM, FriendlySAM
from fastsam.model_state import TwoPasses

#: Each method's class, the settings it takes, and fixed arguments. SGD and EGR have the base optimizer alone.
METHODS: dict[str, tuple[type | None, tuple[str, ...], dict]] = {
    "SGD": (None, (), {}),
    "AdamW": (None, (), {}),
    "SAM": (SAM, ("rho",), {}),
    "ASAM": (SAM, ("rho",), {"adaptive": True}),
    "F-SAM": (FriendlySAM, ("rho", "sigma", "lmbda"), {}),
    "Eigen-SAM": (EigenSAM, ("rho", "alpha", "freq"), {}),
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


def step(
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    place: int,
    full_gradient: Callable[[], list[Tensor]],
) -> Tensor:
    """One step on one batch; returns the loss at the unperturbed weights.

    ``loss_fn`` does a forward pass of the batch and returns the loss. ``place`` is the number of the step in its epoch.
    ``full_gradient`` computes that of the whole training set. BatchNorm's statistics are those of the first pass, and
    dropout draws fresh masks in the second, as in the authors' code.
    """
    if settings.method == "EGR":
        return _gradient_norm_regularised(settings, optimizer, loss_fn)
    if METHODS[settings.method][0] is None:
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    if isinstance(optimizer, GradientComponent):
        if settings.full_gradient == "exact":
            optimizer.eigenvector = full_gradient()
    elif isinstance(optimizer, EigenSAM) and optimizer.eigenvector_due(place if settings.count_in_epoch else None):
        optimizer.update_eigenvector(loss_fn, model)
    passes = TwoPasses(model, shared_masks=False)
    loss = loss_fn()
    loss.backward()
    optimizer.first_step(zero_grad=True)
    with passes.second():
        loss_fn().backward()
    optimizer.second_step(zero_grad=True)
    return loss


def _gradient_norm_regularised(settings: TrainSettings, optimizer, loss_fn) -> Tensor:
    """EGR: descends L + rho ||grad L||, whose gradient is g + rho H g / ||g||: SAM's to first order in rho."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loss = loss_fn()
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    (loss + settings.rho * norm).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss
