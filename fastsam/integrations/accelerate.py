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

``SAMOptimizer(..., ascent_share=0.25)`` has the first pass take the first quarter of every micro-batch.

A fastsam optimizer given to ``accelerator.prepare`` directly works as well with one batch a step and without fp16, and
its ``step(closure)`` returns None there. Accelerate never evaluates the closure of a micro-batch that does not end a
step, and cannot unscale two gradients: both are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import Unpack

from fastsam.distributed.shards import is_dtensor
from fastsam.integrations.micro_batches import MicroBatches, show_models
from fastsam.loop.foreign import any_foreign
from fastsam.loop.share import check_share, first_part
from fastsam.optimizer import SharpnessAware, StepOptions


class SAMOptimizer(AcceleratedOptimizer):
    """A fastsam optimizer that ``accelerator.prepare`` leaves as it is.

    Args:
        optimizer: the fastsam optimizer, afterwards ``.optimizer``.
        accelerator: whose gradient scaler and gradient accumulation are followed.
        model: if given, the second pass leaves its buffers alone and draws the same dropout masks, or fresh ones
            without ``shared_masks``. On several processes give what ``accelerator.prepare(model)`` returned: the
            second pass then is reduced once for all its micro-batches, and ``m_sharpness=True`` is possible.
        ascent_share: the share of each micro-batch that the first of two passes takes, its first samples, rounded up;
            in (0, 1]. With less than 1 BatchNorm's statistics follow that part alone, the second pass draws dropout
            masks of its own, and the loss returned is the part's. A pass that is a step's only one takes every sample.
        options: of every step, such as ``max_norm``: those of ``second_step``.

    Raises ``TypeError`` for an optimizer that is not fastsam's, ``ValueError`` for a share out of its range.
    """

    _is_accelerate_prepared = True  # what accelerator.prepare asks before it wraps an optimizer

    def __init__(
        self,
        optimizer: SharpnessAware,
        accelerator: Accelerator,
        model: torch.nn.Module | None = None,
        shared_masks: bool = True,
        *,
        ascent_share: float = 1.0,
        **options: Unpack[StepOptions],
    ) -> None:
        check_share(ascent_share)
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(f"SAMOptimizer needs an optimizer of fastsam, not {type(optimizer).__name__}")
        super().__init__(optimizer, device_placement=accelerator.device_placement, scaler=accelerator.scaler)
        self.accelerator = accelerator
        self.model = model
        self.ascent_share = ascent_share
        self.micro_batches = MicroBatches(optimizer, model, shared_masks, self._unreduced)
        self.options = options
        self._evaluating = False

    def step(self, closure: Callable[..., Any] | None = None, *batch: Any, **options: Any) -> Any:
        """Takes one micro-batch: ``closure(*batch)`` does forward, ``accelerator.backward(loss)``, returns the loss.

        On the last micro-batch of a step the weights climb, all of them are evaluated once more, and the update is
        made; a step of one evaluation is one here, too. Returns this micro-batch's first loss. Without a closure: the
        step with the micro-batches that ``take`` has evaluated. An exception abandons the step: its micro-batches
        are forgotten and the gradients cleared, so that another attempt (``accelerate.find_executable_batch_size``)
        starts from nothing, as after ``model.zero_grad()``. Raises ``TypeError`` for a closure without arguments while
        gradients accumulate, as it would find another batch in its variables when evaluated again, and where
        ``ascent_share`` has to divide them, ``RuntimeError`` for gradients from elsewhere, and what the optimizer's own
        ``finish`` raises, and :func:`fastsam.loop.share.first_part` for a batch that cannot be divided.
        """
        if self.gradient_state.sync_gradients:
            remedy = "model = accelerator.prepare(model), then SAMOptimizer(optimizer, accelerator, model)"
            show_models(self.optimizer.two_pass.ranks, [] if self.model is None else [self.model], remedy)
            if closure is None and not self.micro_batches:
                raise TypeError(
                    "step() without a closure: write optimizer.step(closure, x, y), whose closure does the forward "
                    "pass and accelerator.backward(loss) and returns the loss, so that it can be evaluated again"
                )
        if closure is not None:
            self._check_first(closure, batch)
        try:
            loss = None if closure is None else self._first(closure, batch)
            if self.gradient_state.sync_gradients:
                self._update({**self.options, **options})
                self.micro_batches.forget()
        except BaseException:  # what is left of a step that failed belongs to no other
            self.micro_batches.abandon()
            self.optimizer.zero_grad()
            raise
        return loss

    def take(self, closure: Callable[[], Any], part: Callable[[], Any] | None) -> Any:
        """Evaluates one micro-batch before ``step()``, or a ``part`` of it; returns the loss."""
        last = self.gradient_state.sync_gradients
        first = partial(self.micro_batches.first, last=last, grad_scaler=self.scaler)
        return self._evaluate(first, closure, part if self.ascent_share < 1 else None)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        if self._evaluating:  # a closure may say so; with several micro-batches it would clear the earlier ones
            return
        super().zero_grad(set_to_none)
        if self.gradient_state.sync_gradients:
            self.micro_batches.abandon()

    def _unreduced(self) -> contextlib.AbstractContextManager:
        """The context in which gradients stay on their process, if the prepared model is known."""
        prepared = isinstance(self.model, (nn.parallel.DistributedDataParallel, FSDPModule))
        return self.accelerator.no_sync(self.model) if prepared else contextlib.nullcontext()

    def _check_first(self, closure: Callable, batch: tuple) -> None:
        two_pass = self.optimizer.two_pass
        # FSDP2 keeps what it has not reduced yet out of .grad.
        visible = not any(map(is_dtensor, two_pass.parameters()))
        if self.micro_batches and visible and not two_pass.has_gradients():
            self.micro_batches.abandon()  # those of an attempt that was given up
        has_batch = bool(batch) or isinstance(closure, partial)
        if self.ascent_share < 1 and not has_batch:
            raise TypeError(
                f"ascent_share={self.ascent_share} divides the batch that it is given: write "
                "optimizer.step(closure, x, y) with a closure that takes the batch as its arguments"
            )
        if not self.gradient_state.sync_gradients and not has_batch:
            raise TypeError(
                "while gradients accumulate give the batch as arguments, optimizer.step(closure, x, y): every closure "
                "is evaluated again when the last micro-batch has come, and would find that one in its variables"
            )
        if not self.micro_batches and any_foreign(self.optimizer.two_pass.parameters()):
            raise RuntimeError(
                "step(closure) found gradients that it did not compute: call optimizer.zero_grad() first, and "
                "accelerator.backward(loss) only in the closure"
            )

    def _first(self, closure: Callable[..., Any], batch: tuple) -> Any:
        whole = partial(closure, *batch)  # of a partial it is one with all its arguments

        def part() -> Any:
            given: dict[Any, Any] = {**dict(enumerate(whole.args)), **whole.keywords}
            parts = first_part(given, self.ascent_share)
            return whole.func(*(parts[i] for i in range(len(whole.args))), **{k: parts[k] for k in whole.keywords})

        return self.take(whole, part)

    def _update(self, options: dict) -> None:
        second = partial(self._evaluate, self.micro_batches.second)
        self.micro_batches.update(second, grad_scaler=self.scaler, **options)
        if self.scaler is not None:
            self.scaler.update()
            self._is_overflow = bool(self.optimizer.found_inf)

    def _evaluate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._evaluating = True
        try:
            with torch.enable_grad():
                return function(*arguments)
        finally:
            self._evaluating = False
