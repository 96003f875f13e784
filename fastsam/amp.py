"""torch.amp.GradScaler with two passes.

    scaler.scale(loss_fn(model(x), y)).backward()
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaler.scale(loss_fn(model(x), y)).backward()
    optimizer.second_step(zero_grad=True, grad_scaler=scaler)
    scaler.update()

or, with a closure that calls ``scaler.scale(loss).backward()``, ``optimizer.step(closure, grad_scaler=scaler)`` and
``scaler.update()``. The kernels divide by the scale as they read the gradients. ``scaler.unscale_(optimizer)`` may come
before either pass, to look at or change the gradients; it is then not done again. An overflow in either pass changes
nothing, and ``update`` lowers the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState


def unscaling_factor(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> float | Tensor:
    """What the gradients have to be multiplied by before use: 1/scale, or 1 where ``unscale_`` was called.

    A float for a scaler on the CPU, else a 0-dimensional float32 tensor on its device. Raises ``RuntimeError`` if
    the scaler has not scaled a loss yet, or was not updated since the last step.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    if scaler._scale is None:
        raise RuntimeError("grad_scaler has not scaled a loss yet: call grad_scaler.scale(loss).backward()")
    progress = scaler._per_optimizer_states[id(optimizer)]
    if progress["stage"] is OptState.STEPPED:
        raise RuntimeError("grad_scaler.update() was not called since the last second_step()")
    if progress["stage"] is OptState.UNSCALED:
        progress["stage"] = OptState.READY  # so that unscale_ can be called for the other pass as well
        return 1.0
    inverse = scaler._scale.double().reciprocal()
    return inverse.item() if inverse.device.type == "cpu" else inverse.float()


def record_step(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Tells ``scaler.update()`` whether this step overflowed."""
    if scaler is None or not scaler.is_enabled():
        return
    progress = scaler._per_optimizer_states[id(optimizer)]
    progress["stage"] = OptState.STEPPED
    progress["found_inf_per_device"] = {found_inf.device: found_inf}


def forget_pass(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """After a step that was abandoned: an ``unscale_`` of its gradients says nothing about those of the next."""
    if scaler is not None and scaler.is_enabled():
        scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY


def refuse_unscaled(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Raises ``RuntimeError`` if ``unscale_`` was called where scaled gradients are still to be added up."""
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED:
        raise RuntimeError(
            "grad_scaler.unscale_() before or inside accumulate(closure): scaled and unscaled gradients would be "
            "added; call it once, before descend()"
        )
