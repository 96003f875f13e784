"""Whole steps from a closure, on top of the two passes.

    step(closure)         two passes over one batch, then the update
    finish(closure)       the same where the first backward pass was done outside
    accumulate(closure)   two passes over a micro-batch; its second gradients are added up in ``.grad``
    descend()             the update with what was accumulated

Every one of them is a transaction: whatever exception leaves it, weights and state are as before. Of gradients,
``step`` leaves none, ``finish`` those it was called with unless it had climbed from them, and ``accumulate`` those
of earlier micro-batches.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastsam.amp import refuse_unscaled
from fastsam.distributed import local
from fastsam.flatten import clear_gradients, is_cleared
from fastsam.interrupts import uninterrupted
from fastsam.model_state import TwoPasses
from fastsam.passes import Accumulated, Passes


class ClosureSteps(Passes):
    """The steps of :class:`~fastsam.optimizer.SharpnessAware` that evaluate a closure."""

    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        model: nn.Module | None = None,
        shared_masks: bool = True,
        **options,
    ):
        """One whole step. ``closure`` does a full forward and backward pass and returns the loss.

        It is evaluated twice, at w and at w + e, or once where ``rho`` is 0 in every group: w + e is w then. Gradients
        are cleared before each pass and on return; the first loss is returned. With ``model`` the second pass leaves
        its buffers (BatchNorm's statistics) alone and draws the dropout masks of the first, or fresh ones without
        ``shared_masks`` (see ``fastsam.model_state``).
        ``options`` are those of :meth:`second_step`: ``grad_scaler``, ``max_norm``, ``clip_value``. Raises
        ``RuntimeError`` if gradients from elsewhere are present: they would be lost (see :meth:`finish`), and
        ``TypeError`` for a closure that is missing or returns no scalar loss.
        """
        if closure is None and self._is_asked_for_empty_state():
            return self._make_empty_state()
        _check_closure(closure, "step")
        if self._perturbed:
            raise RuntimeError("step(closure) between first_step() and second_step(): finish that step, or restore()")
        if self._has_gradients():
            raise RuntimeError(
                "step(closure) found gradients that it did not compute: it evaluates the closure for both passes. "
                "If loss.backward() was called just before, write optimizer.finish(closure) instead of "
                "optimizer.step(closure); otherwise call optimizer.zero_grad() first. Where a framework accumulates or "
                "clips gradients, use fastsam.integrations"
            )
        _refuse_lost_micro_batches()
        self.zero_grad()
        passes = None if model is None else TwoPasses(model, shared_masks)
        with self._ranks.failures_named(), self._own_gradients():
            with self._ranks.first_pass(model, closure):
                loss = self._evaluate(closure)
            self._second_half(None if self._stands_still() else closure, passes, options)
        return loss

    def finish(self, closure: Callable[[], Tensor], *, model: nn.Module | None = None, **options):
        """The step of ``loss.backward(); optimizer.finish(closure)``, as davda54's and F-SAM's code write it.

        The gradients at hand are those of the first pass; ``closure`` (a full forward and backward pass) is
        evaluated once, at w + e. Gradients are cleared on return; the closure's loss is returned. With ``model`` the
        closure leaves its buffers alone; its masks are fresh, as nobody noted what the first pass drew.
        """
        _check_closure(closure, "finish")
        if self._perturbed:
            raise RuntimeError("finish(closure) between first_step() and second_step(): finish that step, or restore()")
        if not any(p.grad is not None for p in self._every_parameter()):
            raise RuntimeError(
                "finish(closure) found no gradients: call loss.backward() first, or optimizer.step(closure), "
                "which evaluates the closure for both passes"
            )
        passes = None if model is None else TwoPasses(model, shared_masks=False)
        with self._ranks.failures_named():
            self._ranks.notice(model)
            return self._second_half(closure, passes, options)

    def accumulate(
        self,
        closure: Callable[[], Tensor],
        *,
        grad_scaler: GradScaler | None = None,
        model: nn.Module | None = None,
        shared_masks: bool = True,
    ):
        """One micro-batch of a step with a perturbation for each (m-sharpness); :meth:`descend` ends the step.

        Climbs from the micro-batch's own gradients, evaluates ``closure`` again at w + e (not where ``rho`` is 0, as in
        :meth:`step`), restores w, and adds these second gradients to ``.grad``. Divide the loss by the number of
        micro-batches for their mean. The first loss is returned; ``model`` and ``shared_masks`` as in :meth:`step`.
        F-SAM's average is fed once a micro-batch: that is the batch of this perturbation: d = g - sigma m then
        subtracts like from like whatever the loss was divided by, and ``lmbda`` counts micro-batches. It becomes state
        in :meth:`descend`, for which it takes one more weight-sized buffer. Eigen-SAM refreshes an eigenvector that is
        due before the first micro-batch of a step.

        After any exception weights, state and accumulated gradients are as before the call. ``zero_grad()`` abandons
        what was accumulated. Raises ``RuntimeError`` for gradients from elsewhere, and as :meth:`first_step` does.
        Source: Foret et al. 2021, section 4.1.
        """
        _check_closure(closure, "accumulate")
        if self._perturbed:
            raise RuntimeError("accumulate(closure) between first_step() and second_step(): finish that step first")
        so_far = self._accumulated
        if so_far is not None and all(p.grad is None for p in self._every_parameter()):
            so_far = None  # cleared by model.zero_grad(): this is the first micro-batch of another step
        if so_far is None and self._has_gradients():
            raise RuntimeError("accumulate(closure) found gradients that it did not compute: call zero_grad() first")
        if so_far is not None and so_far.scaler is not grad_scaler:
            raise RuntimeError("give the same grad_scaler to every accumulate() of a step, and to descend()")
        passes = None if model is None else TwoPasses(model, shared_masks)
        refuse_unscaled(grad_scaler, self)
        with (
            self._ranks.failures_named(),
            self._accumulated_kept(so_far),
            SetAside(self._every_parameter()) as gradients,
            self._or_restored(),
        ):
            with self._ranks.first_pass(model, closure):
                loss = self._evaluate(closure)
            refuse_unscaled(grad_scaler, self)
            if passes is not None:
                passes.check_parameters(self)
            self._climb(grad_scaler, so_far)
            if not self._stands_still():
                self._clear_gradients()
                with contextlib.nullcontext() if passes is None else passes.second():
                    self._evaluate(closure)
                refuse_unscaled(grad_scaler, self)
            self._spaces.collect_gradients()
            with uninterrupted():
                gradients.add_back()
                self._keep_micro_batch(so_far, grad_scaler)
                gradients.committed = True
        return loss

    @torch.no_grad()
    def descend(self, zero_grad: bool = False, **options) -> None:
        """The base optimizer's update at w with the gradients of every :meth:`accumulate` since the last step.

        ``options`` as in :meth:`second_step`; clipping is of the accumulated gradient. If any pass of any micro-batch
        met a NaN or an infinity, nothing changes. Raises ``RuntimeError`` without an ``accumulate`` before it; the
        weights and the state have not changed then, nor after any other exception.
        """
        if self._perturbed:
            raise RuntimeError("descend() between first_step() and second_step(): call second_step()")
        if self._accumulated is None:
            raise RuntimeError("descend() without accumulate(closure): after first_step() call second_step()")
        self._update(self._accumulated, options)
        if zero_grad:
            self.zero_grad()

    def _evaluate(self, closure):
        """The closure's loss, once it is one and gradients are there."""
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            raise TypeError("the closure returned None: it must return the loss after loss.backward()")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise TypeError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}: it must return the scalar loss"
            )
        if all(p.grad is None for p in self._every_parameter()):
            raise RuntimeError(
                "the closure left no gradients: it must call loss.backward() before it returns the loss; if it does, "
                "the model has other parameters than those the optimizer was built with, as after "
                "load_state_dict(assign=True): build the optimizer again; or FSDP2 keeps them back, after "
                "set_requires_gradient_sync(False)"
            )
        return loss

    def _every_parameter(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _has_gradients(self) -> bool:
        gradients = [local(p.grad) for p in self._every_parameter() if not is_cleared(p)]
        return any(bool(g.any()) if g.layout == torch.strided else True for g in gradients)

    def _stands_still(self) -> bool:
        """Whether the second pass would be the first again.

        Not under m-sharpness, where the first is not reduced, nor among pipeline stages, each with groups of its own.
        """
        radii = [group.get("rho") for group in self._method_groups() if group["perturb"]]
        alone = not self._ranks.m_sharpness and self._ranks.process_group is None
        return alone and all(isinstance(rho, (int, float)) and rho == 0 for rho in radii)

    def _second_half(self, closure, passes: TwoPasses | None, options: dict):
        """From the first gradients on; returns the second loss. Without ``closure`` they are the second ones, too."""
        loss = None
        with self._or_restored():
            if passes is not None:
                passes.check_parameters(self)
            self.first_step(zero_grad=closure is not None, grad_scaler=options.get("grad_scaler"))
            if closure is not None:
                with contextlib.nullcontext() if passes is None else passes.second():
                    loss = self._evaluate(closure)
            self.second_step(zero_grad=True, **options)
        return loss

    @contextlib.contextmanager
    def _accumulated_kept(self, so_far: Accumulated | None) -> Iterator[None]:
        """A closure's own zero_grad() abandons the micro-batches before it as little as an exception does."""
        self._accumulated = so_far
        try:
            yield
        except BaseException:
            if self._accumulated is None:
                self._accumulated = so_far
            raise

    @contextlib.contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """Gradients of a step that failed are nobody's: the next step(closure) must not take them for a caller's."""
        try:
            yield
        except BaseException:
            self.zero_grad()
            raise

    def _is_asked_for_empty_state(self) -> bool:
        """Whether this is torch.distributed.checkpoint: it steps with lr = 0 and zero gradients to see the state."""
        stands_still = all(float(group.get("lr", 1)) == 0 for group in self.param_groups)
        return stands_still and not self.state and not self._has_gradients()

    @torch.no_grad()
    def _make_empty_state(self) -> None:
        """Every entry that a checkpoint can fill; until one is loaded, the optimizer is as new for the next step."""
        before = [p.clone() for p in self._every_parameter()]
        self.base_optimizer.step()
        for p, weight in zip(self._every_parameter(), before, strict=True):
            p.copy_(weight)
        for p in (p for group in self.param_groups if group["perturb"] for p in group["params"] if p.requires_grad):
            if self.uses_ema:
                self.state[p]["momentum"] = torch.full_like(p, math.nan)  # the mark of one that never started
            if self.uses_eigenvector:
                self.state[p]["eigenvector"] = torch.zeros_like(p)
        self._state_is_empty = True

    def _forget_empty_state(self) -> None:
        if self._state_is_empty:
            self.state.clear()
            self._state_is_empty = False


class SetAside:
    """``with SetAside(params) as gradients``: cleared for the block, and put back if an exception leaves it."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self.committed = False  # nothing is to be put back any more

    def __enter__(self) -> SetAside:
        # Flattened gradients are zeroed where they are, and those that lie in a bucket of DistributedDataParallel
        # are overwritten: the values of a view need a copy.
        self._kept = [p.grad.clone() if p.grad is not None and p.grad._is_view() else p.grad for p in self._params]
        clear_gradients(self._params, set_to_none=True)
        return self

    @torch.no_grad()
    def add_back(self) -> None:
        """Adds them to the gradients computed in the block."""
        for p, gradient in zip(self._params, self._kept, strict=True):
            if gradient is not None and p.grad is None:
                p.grad = gradient
            elif gradient is not None:
                p.grad.add_(gradient)

    @torch.no_grad()
    def __exit__(self, kind, *_) -> None:
        if kind is None or self.committed:
            return
        clear_gradients(self._params, set_to_none=True)
        for p, gradient in zip(self._params, self._kept, strict=True):
            if gradient is not None and p.grad is not None:  # flattened, and zeroed where it is
                p.grad.copy_(gradient)
            else:
                p.grad = gradient


def _check_closure(closure, method: str) -> None:
    if closure is None:
        raise TypeError(
            f"{method}() needs a closure that does a full forward and backward pass and returns the loss; "
            "in a manual loop call first_step() and second_step()"
        )


def _refuse_lost_micro_batches() -> None:
    """Raises where Accelerate accumulates and calls ``step`` itself: it evaluates no closure but the last one's."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state or state.GradientState().num_steps == 1:
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is not None:
        raise RuntimeError(
            f"Accelerate accumulates gradients over {state.GradientState().num_steps} micro-batches, but would "
            "evaluate the closure of the last alone: wrap the optimizer in fastsam.integrations.accelerate.SAMOptimizer"
        )
