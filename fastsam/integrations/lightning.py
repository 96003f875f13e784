"""fastsam under Lightning's automatic optimization.

    trainer = lightning.Trainer(callbacks=[SAMCallback()], ...)

The module needs no change: ``configure_optimizers`` returns a fastsam optimizer. Without the callback Lightning's
``optimizer.step(closure)`` makes both passes as well, in full precision and with bf16. The callback adds

- accumulation: both passes go over every micro-batch (without it, refused);
- fp16 with Lightning's GradScaler (without it, refused);
- clipping of the second gradient alone, which the update is made with (without it, of both);
- the loss and what ``self.log`` records from the first pass (without it, from both);
- BatchNorm statistics and dropout masks that are the same in both passes;
- a first pass on a part of every batch: ``SAMCallback(ascent_share=0.25)``;
- on several processes ``m_sharpness=True`` (without it, refused).
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from fastsam.integrations.micro_batches import MicroBatches, show_models
from fastsam.loop.share import check_share, first_part
from fastsam.optimizer import SharpnessAware


class SAMCallback(pl.Callback):
    """Has every optimizer step evaluate each of its batches exactly twice, or once where the method does.

    ``training_step`` runs twice a batch, so what it counts by itself (a torchmetrics object) counts both passes.

    Args:
        shared_masks: dropout draws in the second pass what it drew in the first.
        ascent_share: the share of each batch that the first of two passes takes, its first samples, rounded up; in
            (0, 1]. With less than 1 the logged loss is the part's, BatchNorm's statistics follow the part alone, and
            the second pass draws dropout masks of its own. A pass that is a step's only one takes every sample.

    Raises ``ValueError`` for a share out of its range; ``TypeError`` at the start of the training for an optimizer that
    is not fastsam's, ``ValueError`` under a strategy that makes the step itself (DeepSpeed), and for a
    ``training_step(dataloader_iter)``, which draws its batches itself. In training what
    :func:`fastsam.loop.share.first_part` raises for a batch that cannot be divided. Modules with manual optimization
    are left alone.
    """

    def __init__(self, shared_masks: bool = True, ascent_share: float = 1.0) -> None:
        check_share(ascent_share)
        self.shared_masks = shared_masks
        self.ascent_share = ascent_share
        self._installed = contextlib.ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            return
        optimizers = []
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, SharpnessAware):
                raise TypeError(f"SAMCallback needs an optimizer of fastsam, not {type(optimizer).__name__}")
            optimizers.append(optimizer)
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(f"SAMCallback cannot run two passes under {type(trainer.strategy).__name__}")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "training_step(dataloader_iter) draws another batch whenever it is called, and SAMCallback calls it "
                "for both passes: take the batch as its argument, training_step(batch)"
            )
        assert trainer.strategy.model is not None
        for optimizer in optimizers:
            show_models(optimizer.two_pass.ranks, [trainer.strategy.model], 'Trainer(strategy="ddp")')
        unreduced = functools.partial(_unreduced, trainer.strategy)
        self._without_backward = lambda: trainer.fit_loop._skip_backward  # StochasticWeightAveraging's last epoch
        self._ends_step = lambda: not trainer.fit_loop._should_accumulate()
        optimizer, *_ = optimizers  # Lightning has no more of them in automatic optimization
        self._batches = MicroBatches(optimizer, module, self.shared_masks, unreduced)
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._plugin = plugin = trainer.precision_plugin
        self._installed.enter_context(_replaced(loop, "_make_closure", self._make_closure))
        self._installed.enter_context(_replaced(plugin, "optimizer_step", self._optimizer_step))
        # That of mixed precision refuses optimizers that unscale by themselves; ours are unscaled before it.
        clip = functools.partial(Precision.clip_gradients, plugin)
        self._installed.enter_context(_replaced(plugin, "clip_gradients", lambda _, *args, **kw: clip(*args, **kw)))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._installed.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._installed.close()

    def _make_closure(self, original: Callable[..., Closure], kwargs: OrderedDict, *args: Any) -> Closure:
        """Lightning's closure of one batch, whose evaluation in the first pass is remembered."""
        closure = original(kwargs, *args)
        if self._without_backward():
            return closure
        evaluate = closure.closure

        def part() -> ClosureResult:
            batch = first_part(kwargs["batch"], self.ascent_share)
            return original(OrderedDict(kwargs, batch=batch), *args).closure()

        def first(*a: Any) -> ClosureResult:
            scaler = getattr(self._plugin, "scaler", None)
            whole = functools.partial(evaluate, *a)
            taken = part if self.ascent_share < 1 else None
            return self._batches.first(whole, taken, last=self._ends_step(), grad_scaler=scaler)

        closure.closure = first  # type: ignore[method-assign]
        return closure

    def _optimizer_step(
        self,
        original: Callable[..., Any],
        optimizer: SharpnessAware,
        model: pl.LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
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

            def second() -> Any:
                return self._second(model).loss

            def gradients_ready() -> None:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                plugin._after_closure(model, optimizer)  # the hook before the step, and clipping

            estimate = {"estimate_closure": second} if optimizer.recipe.eigenvector else {}
            self._batches.update(second, gradients_ready, grad_scaler=scaler, **estimate, **kwargs)
            if scaler is not None:
                scaler.update()
            return loss
        finally:
            self._batches.abandon()

    def _second(self, model: pl.LightningModule) -> Any:
        with _replaced(model, "log", lambda *args, **kwargs: None):
            return self._batches.second()


def _unreduced(strategy: pl.strategies.Strategy) -> contextlib.AbstractContextManager:
    """In which gradients stay on their process."""
    if not isinstance(strategy, pl.strategies.ParallelStrategy):
        return contextlib.nullcontext()
    return strategy.block_backward_sync()


@contextlib.contextmanager
def _replaced(owner: object, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """``owner.name(...)`` calls ``function(original, ...)`` for as long as the block lasts."""
    original = getattr(owner, name)
    object.__setattr__(owner, name, functools.partial(function, original))
    try:
        yield
    finally:
        object.__delattr__(owner, name)
