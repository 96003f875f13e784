"""fastsam under Lightning's automatic optimization.

    trainer = lightning.Trainer(callbacks=[SAMCallback()], ...)

The module needs no change: ``configure_optimizers`` returns a fastsam optimizer. Without the callback Lightning's
``optimizer.step(closure)`` makes both passes as well, in full precision and with bf16. The callback adds

- accumulation: both passes go over every micro-batch (without it, refused);
- fp16 with Lightning's GradScaler (without it, refused);
- clipping of the second gradient alone, which the update is made with (without it, of both);
- the loss and what ``self.log`` records from the first pass (without it, from both);
- BatchNorm statistics and dropout masks that are the same in both passes;
- on several processes ``m_sharpness=True`` (without it, refused).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.plugins import Precision

from fastsam.integrations.micro_batches import MicroBatches, show_models
from fastsam.optimizer import SharpnessAware


class SAMCallback(pl.Callback):
    """Has every optimizer step evaluate each of its batches exactly twice.

    ``training_step`` runs twice a batch, so what it counts by itself (a torchmetrics object) counts both passes.
    ``shared_masks``: dropout draws in the second pass what it drew in the first. Raises ``TypeError`` at the start of
    the training for an optimizer that is not fastsam's, ``ValueError`` under a strategy that makes the step itself
    (DeepSpeed). Modules with manual optimization are left alone.
    """

    def __init__(self, shared_masks: bool = True) -> None:
        self.shared_masks = shared_masks
        self._installed = contextlib.ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            return
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, SharpnessAware):
                raise TypeError(f"SAMCallback needs an optimizer of fastsam, not {type(optimizer).__name__}")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(f"SAMCallback cannot run two passes under {type(trainer.strategy).__name__}")
        for optimizer in trainer.optimizers:
            show_models(optimizer._ranks, [trainer.strategy.model], 'Trainer(strategy="ddp")')
        m_sharpness = any(optimizer._ranks.m_sharpness for optimizer in trainer.optimizers)
        unreduced = functools.partial(_unreduced, trainer.strategy)
        self._without_backward = lambda: trainer.fit_loop._skip_backward  # StochasticWeightAveraging's last epoch
        self._batches = MicroBatches(module, self.shared_masks, unreduced, m_sharpness)
        self._closure = None
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        plugin = trainer.precision_plugin
        self._installed.enter_context(_replaced(loop, "_make_closure", self._make_closure))
        self._installed.enter_context(_replaced(plugin, "optimizer_step", self._optimizer_step))
        # That of mixed precision refuses optimizers that unscale by themselves; ours are unscaled before it.
        clip = functools.partial(Precision.clip_gradients, plugin)
        self._installed.enter_context(_replaced(plugin, "clip_gradients", lambda _, *args, **kw: clip(*args, **kw)))

    def on_train_end(self, trainer, module) -> None:
        self._installed.close()

    def on_exception(self, trainer, module, exception) -> None:
        self._installed.close()

    def _make_closure(self, original, *args):
        """Lightning's closure of one batch, whose evaluation in the first pass is remembered."""
        self._closure = closure = original(*args)
        evaluate = closure.closure
        if not self._without_backward():
            closure.closure = lambda *a: self._batches.first(functools.partial(evaluate, *a))
        return closure

    def _optimizer_step(self, original, optimizer, model, closure, **kwargs):
        plugin = model.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        seen = len(self._batches)
        try:
            loss = closure()
            if self._without_backward():
                return loss
            evaluated_before = 0 < seen == len(self._batches)  # by the module's own optimizer_step
            if loss is None and not evaluated_before:  # training_step returned None: Lightning skips the step
                optimizer.zero_grad()
                return None

            def second():
                evaluated = self._second(model)
                if scaler is not None:
                    scaler.unscale_(optimizer)
                plugin._after_closure(model, optimizer)  # the hook before the step, and clipping
                return evaluated.loss

            estimate = {"estimate_closure": lambda: self._second(model).loss} if optimizer.uses_eigenvector else {}
            optimizer.finish(second, grad_scaler=scaler, **estimate, **kwargs)
            if scaler is not None:
                scaler.update()
            return loss
        finally:
            self._batches.forget()

    def _second(self, model):
        with _replaced(model, "log", lambda *args, **kwargs: None):
            return self._batches.second()


def _unreduced(strategy: pl.strategies.Strategy) -> contextlib.AbstractContextManager:
    """In which gradients stay on their process."""
    alone = not isinstance(strategy, pl.strategies.ParallelStrategy)
    return contextlib.nullcontext() if alone else strategy.block_backward_sync()


@contextlib.contextmanager
def _replaced(owner, name: str, function) -> Iterator[None]:
    """``owner.name(...)`` calls ``function(original, ...)`` for as long as the block lasts."""
    original = getattr(owner, name)
    object.__setattr__(owner, name, functools.partial(function, original))
    try:
        yield
    finally:
        object.__delattr__(owner, name)
