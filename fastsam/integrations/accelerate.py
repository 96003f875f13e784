"""fastsam around an ``accelerate.Accelerator``.

    optimizer = SAMOptimizer(SAM(model.parameters(), torch.optim.SGD, lr=0.1), accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def closure(x, y):
        loss = loss_fn(model(x), y)
        accelerator.backward(loss)
        return loss

    for x, y in loader:
        with accelerator.accumulate(model):
            loss = optimizer.step(closure, x, y)

A fastsam optimizer given to ``accelerator.prepare`` directly works as well with one batch a step and without fp16, and
its ``step(closure)`` returns None there. Accelerate never evaluates the closure of a micro-batch that does not end a
step, and cannot unscale two gradients: both are refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastsam.integrations.micro_batches import MicroBatches, show_models
from fastsam.optimizer import SharpnessAware


class SAMOptimizer(AcceleratedOptimizer):
    """A fastsam optimizer that ``accelerator.prepare`` leaves as it is.

    Args:
        optimizer: the fastsam optimizer, afterwards ``.optimizer``.
        accelerator: whose gradient scaler and gradient accumulation are followed.
        model: if given, the second pass leaves its buffers alone and draws the same dropout masks, or fresh ones
            without ``shared_masks``. On several processes give what ``accelerator.prepare(model)`` returned: the
            second pass then is reduced once for all its micro-batches, and ``m_sharpness=True`` is possible.
        options: of every step, such as ``max_norm``: those of ``second_step``.

    Raises ``TypeError`` for an optimizer that is not fastsam's.
    """

    _is_accelerate_prepared = True  # what accelerator.prepare asks before it wraps an optimizer

    def __init__(
        self,
        optimizer: SharpnessAware,
        accelerator: Accelerator,
        model: torch.nn.Module | None = None,
        shared_masks: bool = True,
        **options,
    ) -> None:
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(f"SAMOptimizer needs an optimizer of fastsam, not {type(optimizer).__name__}")
        super().__init__(optimizer, device_placement=accelerator.device_placement, scaler=accelerator.scaler)
        self.accelerator = accelerator
        self.model = model
        self.micro_batches = MicroBatches(model, shared_masks, self._unreduced, optimizer._ranks.m_sharpness)
        self.options = options
        self._evaluating = False

    def step(self, closure: Callable | None = None, *batch, **options):
        """Takes one micro-batch: ``closure(*batch)`` does forward, ``accelerator.backward(loss)``, returns the loss.

        On the last micro-batch of a step the weights climb, all of them are evaluated once more, and the update is
        made. Returns this micro-batch's loss at w. Without a closure: the step with the micro-batches that
        ``micro_batches.first`` has evaluated. Raises ``TypeError`` for a closure without arguments while gradients
        accumulate, as it would find another batch in its variables when evaluated again, ``RuntimeError`` for
        gradients from elsewhere, and what the optimizer's own ``finish`` raises.
        """
        if self.gradient_state.sync_gradients:
            remedy = "model = accelerator.prepare(model), then SAMOptimizer(optimizer, accelerator, model)"
            show_models(self.optimizer._ranks, [] if self.model is None else [self.model], remedy)
            if closure is None and not self.micro_batches:
                raise TypeError(
                    "step() without a closure: write optimizer.step(closure, x, y), whose closure does the forward "
                    "pass and accelerator.backward(loss) and returns the loss, so that it can be evaluated again"
                )
        loss = None if closure is None else self._first(closure, batch)
        if not self.gradient_state.sync_gradients:
            return loss
        try:
            self._second({**self.options, **options})
        except BaseException:
            self.optimizer.zero_grad()  # what is left of a step that failed belongs to no other
            raise
        finally:
            self.micro_batches.forget()
        return loss

    def zero_grad(self, set_to_none=None):
        if self._evaluating:  # a closure may say so; with several micro-batches it would clear the earlier ones
            return
        super().zero_grad(set_to_none)
        if self.gradient_state.sync_gradients:
            self.micro_batches.forget()

    def _unreduced(self):
        """The context in which gradients stay on their process, if the prepared model is known."""
        prepared = isinstance(self.model, (nn.parallel.DistributedDataParallel, FSDPModule))
        return self.accelerator.no_sync(self.model) if prepared else contextlib.nullcontext()

    def _first(self, closure: Callable, batch: tuple):
        if not self.gradient_state.sync_gradients and not batch and not isinstance(closure, functools.partial):
            raise TypeError(
                "while gradients accumulate give the batch as arguments, optimizer.step(closure, x, y): every closure "
                "is evaluated again when the last micro-batch has come, and would find that one in its variables"
            )
        if not self.micro_batches and self.optimizer._has_gradients():
            raise RuntimeError(
                "step(closure) found gradients that it did not compute: call optimizer.zero_grad() first, and "
                "accelerator.backward(loss) only in the closure"
            )
        return self._evaluate(self.micro_batches.first, functools.partial(closure, *batch))

    def _second(self, options: dict) -> None:
        second = functools.partial(self._evaluate, self.micro_batches.second)
        self.optimizer.finish(second, grad_scaler=self.scaler, **options)
        if self.scaler is not None:
            self.scaler.update()
            self._is_overflow = bool(self.optimizer.found_inf)

    def _evaluate(self, function: Callable, *arguments):
        self._evaluating = True
        try:
            with torch.enable_grad():
                return function(*arguments)
        finally:
            self._evaluating = False
