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

from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState


class Scaling:
    """One step's dealings with a gradient scaler; without an enabled scaler nothing happens.

    ``optimizer`` is the object by whose identity the scaler keeps its records: the one that the user holds.
    """

    def __init__(self, scaler: GradScaler | None, optimizer: object) -> None:
        self.scaler = scaler
        self._optimizer = optimizer
        self._on = scaler is not None and scaler.is_enabled()
        self._unscaled = False  # whether factor() found that unscale_ was called

    @property
    def _record(self) -> dict:
        assert self.scaler is not None
        return self.scaler._per_optimizer_states[id(self._optimizer)]

    def factor(self) -> float | Tensor:
        """What the gradients have to be multiplied by before use: 1/scale, or 1 where ``unscale_`` was called.

        A float for a scaler on the CPU, else a 0-dimensional float32 tensor on its device. Raises ``RuntimeError``
        if the scaler has not scaled a loss yet, or was not updated since the last step.
        """
        if not self._on:
            return 1.0
        assert self.scaler is not None
        if self.scaler._scale is None:
            raise RuntimeError("grad_scaler has not scaled a loss yet: call grad_scaler.scale(loss).backward()")
        record = self._record
        if record["stage"] is OptState.STEPPED:
            raise RuntimeError("grad_scaler.update() was not called since the last second_step()")
        if record["stage"] is OptState.UNSCALED:
            record["stage"] = OptState.READY  # so that unscale_ can be called for the other pass as well
            self._unscaled = True
            return 1.0
        inverse = self.scaler._scale.double().reciprocal()
        return inverse.item() if inverse.device.type == "cpu" else inverse.float()

    def read_again(self) -> None:
        """The gradients that ``factor`` was asked for are those of the next pass as well."""
        if self._unscaled:
            self._record["stage"] = OptState.UNSCALED

    def step_taken(self, found_inf: Tensor) -> None:
        """Tells ``scaler.update()`` whether this step overflowed."""
        if self._on:
            record = self._record
            record["stage"] = OptState.STEPPED
            record["found_inf_per_device"] = {found_inf.device: found_inf}

    def abandoned(self) -> None:
        """After a step that was abandoned: an ``unscale_`` of its gradients says nothing about those of the next."""
        if self._on:
            self._record["stage"] = OptState.READY

    def refuse_unscaled(self) -> None:
        """Raises ``RuntimeError`` if ``unscale_`` was called where scaled gradients are still to be added up."""
        if self._on and self._record["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "grad_scaler.unscale_() before or inside accumulate(closure): scaled and unscaled gradients would be "
                "added; call it once, before descend()"
            )
